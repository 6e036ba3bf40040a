#!/usr/bin/env bash
# Compiles every preset for its TPU slice on this machine, which needs none, and prints what each needs and could reach.
# Ends with code 0 only where all fit their chips and use the attention kernel. Some minutes; needs libtpu (Linux, x86).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' "$0"
    echo "usage: bash launch/prove.sh [--dry-run]    OUT=build/prove names the folder of the reports"
    exit 0
fi
OUT=${OUT:-build/prove}
PRESETS=(
    "owt_small --topology=v5e:4x4"
    "owt_medium --topology=v5e:16x16"
    "owt_1_3b --topology=v5e:16x16 --slices=2"
    "owt_7b --topology=v5p:8x8x8"
)
if [ "${1:-}" = "--dry-run" ]; then
    for preset in "${PRESETS[@]}"; do
        echo "armd compile --config=experiments/${preset%% *}.py ${preset#* } --json"
    done
    exit 0
fi
. launch/environment.sh
use_environment .venv/test "[test]"

mkdir -p "$OUT"
for preset in "${PRESETS[@]}"; do
    # shellcheck disable=SC2086  # the flags are words
    armd compile --config="experiments/${preset%% *}.py" ${preset#* } --json >"$OUT/${preset%% *}.json" || [ $? = 1 ]
done
python - "$OUT" "${PRESETS[@]%% *}" <<'PYTHON'
import json
import pathlib
import sys

folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
good = True
print("| preset | slice | mesh | peak GiB a chip | attention kernel | step ms | MFU | limit | compiled in s |")
print("|---|---|---|---|---|---|---|---|---|")
for name in names:
    text = (folder / f"{name}.json").read_text()
    if not text:  # the compiler's own words stand above
        print(f"| {name} | could not be compiled |")
        good = False
        continue
    r = json.loads(text)
    kernel = any("splash" in kernel for kernel in r["attention_kernels"])
    good = good and r["fits"] and kernel
    slices = f"{r['slices']} x " if r["slices"] > 1 else ""
    mesh = " x ".join(str(size) for size in r["mesh"].values())
    peak = f"{r['peak_bytes'] / 2**30:.1f} of {r['hbm_bytes'] / 2**30:.0f}"
    speed = f"{r['predicted_step_seconds'] * 1e3:.0f} | {r['predicted_mfu']:.0%}" if r["fits"] else "does not fit | "
    print(
        f"| {name} | {slices}{r['topology']} | {mesh} | {peak} | {'splash' if kernel else 'none'} | {speed}"
        f" | {r['limiting_term']} | {r['compile_seconds']:.0f} |"
    )
sys.exit(0 if good else 1)
PYTHON
