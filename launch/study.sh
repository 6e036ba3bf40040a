#!/usr/bin/env bash
# The study of experiments/study: trains and measures every row on your text, which takes hours on two cores, and writes
# the page and its pictures from what came out. If it is run again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' launch/study.sh
    echo "usage: bash launch/study.sh TEXT [minutes|gpu] [--config.section.field=value ...]"
    echo "TEXT is a file, a folder or a quoted glob. minutes: the main rows with one seed and 40 steps, which took 9"
    echo "minutes on two cores. gpu: models of 124M parameters on one GPU. OUT=DIR names the folder of everything"
    echo "(runs/study, runs/study-minutes and so on), JOBS=2 how many rows are trained at once."
    exit 0
fi
if [ $# = 0 ]; then
    echo "error: name the TEXT to train on (see bash launch/study.sh --help)" >&2
    exit 2
fi
. launch/environment.sh
# A path is meant where the command was given.
absolute() {
    case $1 in
        /* | tfds:* | *://*) echo "$1" ;;
        *) echo "$OLDPWD/$1" ;;
    esac
}
TEXT=$(absolute "$1")
case $TEXT in
    /*) if [ ! -e "$TEXT" ] && ! compgen -G "$TEXT" >/dev/null; then
        echo "error: $TEXT: there is no such text" >&2
        exit 2
    fi ;;
esac
shift
FORM=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    FORM=$1
    shift
fi

if [ -n "${OUT:-}" ]; then OUT=$(absolute "$OUT"); else OUT=$PWD/runs/study${FORM:+-$FORM}; fi
case $FORM in
    gpu) EXTRAS="[cuda]" JOBS=${JOBS:-1} ;; # one training takes the whole card
    *) EXTRAS="" ;;
esac
use_environment ".venv/study$EXTRAS" "$EXTRAS"
mkdir -p "$(dirname "$OUT")"
JOBS=${JOBS:-2}
trap 'echo "$SECONDS" >>"${OUT%/}.seconds"' EXIT # how long this call took, for the page
code=0
armd sweep --config="experiments/study/study.py${FORM:+:$FORM}" --out="$OUT" --jobs="$JOBS" \
    --config.data.path="$TEXT" "$@" || code=$?
if [ "$code" -gt 1 ]; then exit "$code"; fi # 1: some rows failed, and the page is about the others
armd report --sweep="$OUT"
echo "$SECONDS" >>"${OUT%/}.seconds"
SECONDS=0 # what follows is the little that the page does not count
python experiments/study/write_up.py --sweep="$OUT" --jobs="$JOBS" --out="$OUT/page"
exit "$code"
