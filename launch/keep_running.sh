#!/usr/bin/env bash
# Runs a command until it is done: again after a crash, but not after a mistake of the user (exit code 2) or a signal.
# SIGTERM, SIGINT, SIGHUP and SIGUSR2 ask the command to save and end. Ends with the command's exit code.
set -euo pipefail
usage() {
    sed -n '2,3s/^# //p' "$0"
    cat <<TEXT
usage: bash launch/keep_running.sh [--max-restarts=10] [--pause=5] [--status-file=FILE] [--dry-run] -- COMMAND...
  --max-restarts=10   give up after this many restarts, with the exit code of the last one
  --pause=5           seconds between two starts, so that the processes of the other workers have ended too
  --status-file=FILE  contains \`running PID\` while this runs and \`ended CODE\` afterwards; refuses a second start
  --dry-run           print the command instead of running it
TEXT
}
. "$(dirname "$0")/common.sh"

MAX_RESTARTS=10 PAUSE=5 STATUS_FILE=""
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
        --pause=*) PAUSE=${1#*=} ;;
        --status-file=*) STATUS_FILE=${1#*=} ;;
        --) shift; break ;;
        *) fail "unknown option $1" ;;
    esac
    shift
done
need_number --max-restarts "$MAX_RESTARTS" 0
need_number --pause "$PAUSE" 0
[ $# -gt 0 ] || fail "the command is missing: end with -- COMMAND..."
if [ -n "$DRY_RUN" ]; then
    shell_words "$@"
    exit 0
fi

# The terminal or the reader of the log may be gone, which must not end the script and leave the command alone.
note() {
    (trap '' PIPE && exec 3>&2 2>/dev/null && echo "keep_running: $*" >&3) || true
}

set_status() {
    if [ -n "$STATUS_FILE" ]; then
        echo "$*" >"$STATUS_FILE.new"
        mv "$STATUS_FILE.new" "$STATUS_FILE"
    fi
}

if [ -n "$STATUS_FILE" ] && [ -f "$STATUS_FILE" ]; then
    read -r state pid <"$STATUS_FILE" || true
    if [ "$state" = running ] && kill -0 "$pid" 2>/dev/null; then
        fail "already running here as process $pid ($STATUS_FILE); stop that one first"
    fi
fi
set_status running $$

child="" stopped=""
# The child is empty if the signal comes between two starts.
stop() {
    stopped=1
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null || true
    fi
}
trap stop TERM INT
# If a connection is lost, SIGHUP comes from the shell and once more from the kernel. `armd train` would take a second
# SIGTERM as the wish to leave at once.
trap '[ -n "$stopped" ] || stop' HUP USR2
restarts=0
while :; do
    # The command has a process group of its own. Ctrl-C then reaches only this script, whose trap passes it on once.
    set -m
    "$@" &
    set +m
    child=$!
    if [ -n "$stopped" ]; then # the signal came while the command was starting
        kill -TERM "$child" 2>/dev/null || true
    fi
    code=0
    wait "$child" || code=$?
    # A trapped signal ends `wait` early, while the command is still saving.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=""
    if [ "$code" = 0 ] || [ "$code" = 2 ] || [ -n "$stopped" ]; then
        break
    fi
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        note "code $code after $restarts restarts: giving up"
        break
    fi
    restarts=$((restarts + 1))
    note "code $code: restart $restarts of $MAX_RESTARTS in $PAUSE s"
    # The pause is taken in steps of a second, because a signal that comes just before a wait does not end it.
    for ((waited = 0; waited < PAUSE; waited++)); do
        if [ -n "$stopped" ]; then
            break
        fi
        sleep 1 &
        wait $! || true
    done
    if [ -n "$stopped" ]; then
        break
    fi
done
set_status ended "$code"
exit "$code"
