# Sourced by the launchers for other machines: one-line errors, and commands that run or, with --dry-run, are printed.
# COMMAND is the command that every worker starts. set_command fills it from the words after `--`.

DRY_RUN=""
COMMAND=()

fail() {
    echo "error: $* (see bash $0 --help)" >&2
    exit 2
}

# need OPTION VALUE WHAT: ends with an error if VALUE is empty.
need() {
    [ -n "$2" ] || fail "$1 is missing: $3"
}

# need_number OPTION VALUE [LEAST=1]: ends with an error if VALUE is not a whole number of at least LEAST.
need_number() {
    local least=${3:-1}
    case $2 in
        "" | 0?* | *[!0-9]*) ;;
        *) if [ "$2" -ge "$least" ]; then return; fi ;;
    esac
    fail "$1=$2 must be a whole number of at least $least"
}

# The words after `--`. `armd train` is told that it is one of several processes; any other command stays as it is.
set_command() {
    [ $# -gt 0 ] || fail "the command is missing: end with -- armd train --config=FILE --workdir=FOLDER"
    if [ "$1" = armd ] && [ "${2:-}" = train ]; then
        COMMAND=(armd train --distributed=on "${@:3}")
    else
        COMMAND=("$@")
    fi
}

# Prints the words as one line that a shell reads back as the same words.
shell_words() {
    local word line=""
    for word in "$@"; do
        case $word in
            "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        line="$line${line:+ }$word"
    done
    printf '%s\n' "$line"
}

run() {
    if [ -n "$DRY_RUN" ]; then
        shell_words "$@"
    else
        command -v "$1" >/dev/null || fail "$1 is not installed on this machine"
        "$@"
    fi
}
