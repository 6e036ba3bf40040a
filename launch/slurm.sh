#!/usr/bin/env bash
# Submits a training to SLURM: one process per GPU. Before its time is up, the job saves and queues itself again.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() {
    sed -n '2s/^# //p' launch/slurm.sh
    cat <<TEXT
usage: bash launch/slurm.sh --nodes=N --gpus-per-node=N --time=TIME [options] -- armd train ...
  --time=24:00:00       time limit of one job; after it, the run continues in the next job
  --name=armd           the job's name
  --partition=NAME      if the cluster asks for one
  --account=NAME        if the cluster asks for one
  --cpus-per-task=8     cores per process
  --save-seconds=120    SIGTERM comes this long before the time limit; must be longer than a checkpoint takes
  --max-restarts=20     restarts after a crash; a run that was stopped and saved is always queued again
  --setup=COMMAND       runs first, on the first node, e.g. 'source .venv/cuda/bin/activate'; may be repeated
  --sbatch-flag=FLAG    one more option for sbatch, e.g. --qos=long; may be repeated
  --dry-run             print the batch script instead of submitting it
\`scancel\` ends the job for good.
TEXT
}
if [ "${1:-}" = --help ]; then
    usage
    exit 0
fi
. launch/common.sh

NODES="" GPUS="" TIME="" JOB=armd PARTITION="" ACCOUNT="" CPUS=8 SAVE_SECONDS=120 MAX_RESTARTS=20 SETUP=() FLAGS=()
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        --nodes=*) NODES=${1#*=} ;;
        --gpus-per-node=*) GPUS=${1#*=} ;;
        --time=*) TIME=${1#*=} ;;
        --name=*) JOB=${1#*=} ;;
        --partition=*) PARTITION=${1#*=} ;;
        --account=*) ACCOUNT=${1#*=} ;;
        --cpus-per-task=*) CPUS=${1#*=} ;;
        --save-seconds=*) SAVE_SECONDS=${1#*=} ;;
        --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
        --setup=*) SETUP+=("${1#*=}") ;;
        --sbatch-flag=*) FLAGS+=("${1#*=}") ;;
        --) shift; break ;;
        *) fail "unknown option $1" ;;
    esac
    shift
done
need --nodes "$NODES" "the number of machines"
need --gpus-per-node "$GPUS" "the number of GPUs, and so of processes, of each machine"
need --time "$TIME" "the time limit of one job, such as 24:00:00"
need_number --nodes "$NODES"
need_number --gpus-per-node "$GPUS"
need_number --cpus-per-task "$CPUS"
need_number --save-seconds "$SAVE_SECONDS"
need_number --max-restarts "$MAX_RESTARTS"
set_command "$@"

batch_script() {
    local flag
    echo "#!/bin/bash"
    for flag in "--job-name=$JOB" "--nodes=$NODES" "--ntasks-per-node=$GPUS" "--gpus-per-node=$GPUS" \
        "--cpus-per-task=$CPUS" "--time=$TIME" ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"} \
        --requeue "--signal=TERM@$SAVE_SECONDS" --open-mode=append --output=%x-%j.out ${FLAGS[@]+"${FLAGS[@]}"}; do
        echo "#SBATCH $flag"
    done
    echo
    if [ ${#SETUP[@]} -gt 0 ]; then
        printf '%s\n' "${SETUP[@]}" ""
    fi
    cat <<TEXT
# Every process sees all GPUs of its node and takes the one with its local id. The signal goes to the processes and not
# to this script, which continues below. When one process ends, the others have $SAVE_SECONDS seconds to end as well.
code=0
srun --cpus-per-task=$CPUS --kill-on-bad-exit=0 --wait=$SAVE_SECONDS --label $(shell_words "${COMMAND[@]}") || code=\$?

# 0: done. 2: a mistake in the command or its config. 75: stopped after saving. Anything else: a crash.
case \$code in
    0 | 2) ;;
    75) scontrol requeue "\$SLURM_JOB_ID" ;;
    *) if [ "\${SLURM_RESTART_COUNT:-0}" -lt $MAX_RESTARTS ]; then scontrol requeue "\$SLURM_JOB_ID"; fi ;;
esac
exit "\$code"
TEXT
}

if [ -n "$DRY_RUN" ]; then
    batch_script
else
    command -v sbatch >/dev/null || fail "sbatch is not installed on this machine"
    batch_script | sbatch
fi
