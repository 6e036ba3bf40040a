#!/usr/bin/env bash
# Installs, starts and stops a training on every worker of an existing TPU VM (one slice).
set -euo pipefail
cd "$(dirname "$0")/.."
usage() {
    sed -n '2s/^# //p' launch/tpu_vm.sh
    cat <<TEXT
usage: bash launch/tpu_vm.sh VERB --name=NAME --project=PROJECT --zone=ZONE [options] [-- armd train ...]
  install    copy the committed state of this repository to every worker and install it there with uv
  train      start the command after -- in the background on every worker; it is started again after a crash
  logs       follow the output of one worker
  stop       send SIGTERM on every worker; the run saves, and the next \`train\` continues it
options (the environment variables NAME, PROJECT, ZONE and SETUP do the same):
  --worker=0            the worker whose output \`logs\` follows
  --extras=tpu          optional dependencies that \`install\` installs, such as tpu,tfds,wandb
  --setup=COMMAND       \`install\` runs it on every worker, e.g. to mount the folder that contains --workdir
  --max-restarts=10     restarts after a crash
  --gcloud-flag=FLAG    one more option for gcloud, e.g. --internal-ip; may be repeated
  --dry-run             print the commands instead of running them
Every worker must see --workdir and the data under the same name (see launch/README.md).
example: bash launch/tpu_vm.sh train --name=pod -- armd train --config=experiments/owt_small.py --workdir=/mnt/runs/owt
TEXT
}
if [ "${1:-}" = --help ]; then
    usage
    exit 0
fi
. launch/common.sh
. launch/tpu_workers.sh

NAME=${NAME:-} PROJECT=${PROJECT:-} ZONE=${ZONE:-} SETUP=${SETUP:-} EXTRAS=tpu WORKER=0 MAX_RESTARTS=10 FLAGS=()
VERB=${1:-}
case $VERB in
    install | train | logs | stop) shift ;;
    *) fail "the first word must be install, train, logs or stop, not \`$VERB\`" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        --name=*) NAME=${1#*=} ;;
        --project=*) PROJECT=${1#*=} ;;
        --zone=*) ZONE=${1#*=} ;;
        --worker=*) WORKER=${1#*=} ;;
        --extras=*) EXTRAS=${1#*=} ;;
        --setup=*) SETUP=${1#*=} ;;
        --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
        --gcloud-flag=*) FLAGS+=("${1#*=}") ;;
        --) shift; break ;;
        *) fail "unknown option $1" ;;
    esac
    shift
done
need --name "$NAME" "the TPU VM's name"
need --project "$PROJECT" "the Google Cloud project"
need --zone "$ZONE" "the zone, such as us-west4-a"
need --extras "$EXTRAS" "at least tpu"
need_number --max-restarts "$MAX_RESTARTS" 0

GROUP=tpu-vm
WHERE=("--project=$PROJECT" "--zone=$ZONE" ${FLAGS[@]+"${FLAGS[@]}"})
EVERY_WORKER=(--worker=all)
case $VERB in
    install) install_workers ;;
    train) set_command "$@"; start_workers ;;
    logs) follow_log ;;
    stop) stop_workers ;;
esac
