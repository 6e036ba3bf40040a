# Sourced by the scripts here: a virtual environment of the project's own, made or brought up to date if needed.
#   use_environment FOLDER EXTRAS     e.g. use_environment .venv/run ""   or   use_environment .venv/test "[test]"
# PYTHON names the interpreter to build it with, which must be 3.11 or newer. The default is the first of python3.11,
# python3.12, python3.13, python3 and python that is.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with venv was found; install one or name it: PYTHON=/path/to/python bash $0" >&2
    return 2
}

# Prints a Python of 3.12 or newer if find_python takes an older one. Returns code 1 if there is none.
newer_python() {
    local candidate
    if "$(find_python)" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then return 1; fi
    for candidate in python3.12 python3.13 python3.14 "$(pyenv root 2>/dev/null)"/versions/3.1[234]*/bin/python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

use_environment() {
    local folder=$1 extras=$2 python stamp
    python=$(find_python) || exit 2
    # It is installed again only if the extras or the requirements have changed.
    stamp=$(echo "$extras" | cat - requirements.txt setup.py | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ ! -x "$folder/bin/python" ] || [ "$(cat "$folder/installed" 2>/dev/null)" != "$stamp" ]; then
        echo "installing into $folder (a few minutes the first time)"
        "$python" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
        echo "$stamp" >"$folder/installed"
    fi
    PATH="$PWD/$folder/bin:$PATH"
    export PATH
}
