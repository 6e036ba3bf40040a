#!/usr/bin/env bash
# The study of experiments/study: trains and measures every row on your text, which takes hours on two cores, and writes
# the page and its pictures from what came out. If it is run again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' launch/study.sh
    echo "usage: bash launch/study.sh TEXT [minutes|gpu] [--config.section.field=value ...]"
    echo "TEXT is a file, a folder or a quoted glob. minutes: the main rows with one seed and fewer steps. gpu: models of"
    echo "124M parameters on one GPU. OUT=runs/study names the folder of everything, JOBS=2 how many rows are trained at once."
    exit 0
fi
if [ $# = 0 ]; then
    echo "error: name the TEXT to train on (see bash launch/study.sh --help)" >&2
    exit 2
fi
. launch/environment.sh
OUT=${OUT:-runs/study}
case $1 in
    /* | tfds:*) TEXT=$1 ;;
    *) TEXT=$OLDPWD/$1 ;; # as it is meant where the command was given
esac
shift
FORM=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    FORM=$1
    shift
fi

case $FORM in
    gpu) EXTRAS="[cuda]" JOBS=${JOBS:-1} ;; # one training takes the whole card
    *) EXTRAS="" ;;
esac
use_environment ".venv/study$EXTRAS" "$EXTRAS"
mkdir -p "$(dirname "$OUT")"
trap 'echo "$SECONDS" >>"${OUT%/}.seconds"' EXIT # how long this call took, for the page
armd sweep --config="experiments/study/study.py${FORM:+:$FORM}" --out="$OUT" --jobs="${JOBS:-2}" \
    --config.data.path="$TEXT" "$@"
armd report --sweep="$OUT"
python experiments/study/write_up.py --sweep="$OUT" --out="$OUT/page"
