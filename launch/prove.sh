#!/usr/bin/env bash
# Compiles every preset for its TPU slice, on a machine without a TPU, and prints what it needs and at best reaches. With
# --scaling, compiles one config for 16, 256 and 512 chips instead: with one batch (strong scaling), and with a batch
# that grows with the chips (weak scaling). The exit code is 0 only if all fit their chips and use the attention kernel.
# Takes 10 minutes on two cores, --scaling 20. Needs libtpu (Linux, x86).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/prove}
TABLE=presets
RUNS=(
    "owt_small --topology=v5e:4x4"
    "owt_medium --topology=v5e:16x16"
    "owt_1_3b --topology=v5e:16x16 --slices=2"
    "owt_7b --topology=v5p:8x8x8"
)
# The first three have one batch of 512 rows, one row for each of 512 chips. There can be no microbatches then, and so the
# others have none either. The first and the last two have 32 rows for each chip.
SCALING=(
    "owt_small --topology=v5e:4x4 --config.training.microbatches=1"
    "owt_small --topology=v5e:16x16 --config.training.microbatches=1"
    "owt_small --topology=v5e:16x16 --slices=2 --config.training.microbatches=1"
    "owt_small --topology=v5e:16x16 --config.training.microbatches=1 --config.training.batch_size=8192"
    "owt_small --topology=v5e:16x16 --slices=2 --config.training.microbatches=1 --config.training.batch_size=16384"
)
DRY_RUN=
for option in "$@"; do
    case $option in
        --help)
            sed -n '2,5s/^# //p' launch/prove.sh
            echo "usage: bash launch/prove.sh [--scaling] [--dry-run]    OUT=build/prove names the result folder"
            exit 0
            ;;
        --scaling) TABLE=scaling RUNS=("${SCALING[@]}") ;;
        --dry-run) DRY_RUN=yes ;;
        *)
            echo "error: $option is not known (see bash launch/prove.sh --help)" >&2
            exit 2
            ;;
    esac
done
if [ "$DRY_RUN" ]; then
    for run in "${RUNS[@]}"; do
        echo "armd compile --config=experiments/${run%% *}.py ${run#* } --json"
    done
    exit 0
fi
. launch/environment.sh
use_environment .venv/test "[test]"

mkdir -p "$OUT"
reports=()
for run in "${RUNS[@]}"; do
    reports+=("$OUT/$TABLE-${#reports[@]}-${run%% *}.json")
    # shellcheck disable=SC2086  # the flags are several words
    armd compile --config="experiments/${run%% *}.py" ${run#* } --json >"${reports[-1]}" || [ $? = 1 ]
done
python - "$TABLE" "${reports[@]}" <<'PYTHON'
import json
import pathlib
import sys

table, *files = sys.argv[1:]
good = True
if table == "presets":
    print("| preset | slice | mesh | state GiB | temporary GiB | peak GiB per chip | attention kernel | bound: step ms"
          " | bound: MFU | bound: AR MFU | limit | chip-hours, bound to published efficiency | compiled in s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
else:
    print("| chips | tokens per step | slice | mesh | TFLOPs per chip | peak GiB per chip | collectives sent, MiB per chip | of these"
          " between slices | bound: step ms | bound: MFU | bound: AR MFU | limit |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
for file in files:
    name = pathlib.Path(file).stem.split("-")[-1]
    text = pathlib.Path(file).read_text()
    if not text:  # the compiler's message has been printed already
        print(f"| {name} | could not be compiled |")
        good = False
        continue
    r = json.loads(text)
    kernel = any("splash" in kernel for kernel in r["attention_kernels"])
    good = good and r["fits"] and kernel
    place = (f"{r['slices']} x " if r["slices"] > 1 else "") + r["topology"]
    mesh = " x ".join(str(size) for size in r["mesh"].values())
    peak = f"{r['peak_bytes'] / 2**30:.1f} of {r['hbm_bytes'] / 2**30:.0f}"
    if not r["fits"]:
        print(f"| {name} | {place} | {mesh} | {peak} | does not fit |")
        continue
    shares = (r["predicted_mfu"], r["predicted_ar_mfu"])
    mfu, ar_mfu = ("unknown" if share is None else f"{share:.0%}" for share in shares)
    speed = f"{r['predicted_step_seconds'] * 1e3:.0f} | {mfu} | {ar_mfu} | {r['limiting_term']}"
    if table == "presets":
        attention = "splash" if kernel else "none"
        state, temporary = (f"{r[key] / 2**30:.2f}" for key in ("argument_bytes", "temp_bytes"))
        memory = f"{state} | {temporary} | {peak}"
        hours = "{:,.0f} to {:,.0f}".format(*r["bill"]["chip_hours"]) if r["bill"] else "unknown"
        print(f"| {name} | {place} | {mesh} | {memory} | {attention} | {speed} | {hours} | {r['compile_seconds']:.0f} |")
        continue
    sent = sum(c["sent_bytes"] for c in r["collectives"]) / 2**20
    between = sum(c["sent_bytes"] for c in r["collectives"] if c["between_slices"]) / 2**20
    tokens = r["bill"]["tokens"] / r["bill"]["steps"]
    work = r["executed_flops"] / r["chips"] / 1e12
    print(f"| {r['chips']} | {tokens:,.0f} | {place} | {mesh} | {work:.1f} | {peak} | {sent:.0f} | {between:.0f} | {speed} |")
sys.exit(0 if good else 1)
PYTHON
