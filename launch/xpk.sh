#!/usr/bin/env bash
# Starts a training as an XPK workload, on a GKE cluster that XPK created: every host of every slice runs the command.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() {
    sed -n '2s/^# //p' launch/xpk.sh
    cat <<TEXT
usage: bash launch/xpk.sh --name=NAME --cluster=CLUSTER --project=PROJECT --zone=ZONE --tpu-type=TYPE --image=IMAGE
           [options] -- armd train ...
  --tpu-type=TYPE       XPK's name of a slice: v5litepod-16 is v5e:4x4, v5litepod-256 is v5e:16x16, v5p-1024 is
                        v5p:8x8x8
  --slices=1            slices, connected by the data centre's network
  --image=IMAGE         container image made with launch/Dockerfile
  --max-restarts=100    restarts after a stop or a crash; XPK itself would not restart
  --grace-seconds=600   seconds from SIGTERM to SIGKILL; must be longer than a checkpoint takes
  --xpk-flag=FLAG       one more option for xpk workload create, e.g. --priority=high; may be repeated
  --dry-run             print the command instead of running it
The environment variables NAME, CLUSTER, PROJECT, ZONE and IMAGE do the same as their options.
TEXT
}
if [ "${1:-}" = --help ]; then
    usage
    exit 0
fi
. launch/common.sh

NAME=${NAME:-} CLUSTER=${CLUSTER:-} PROJECT=${PROJECT:-} ZONE=${ZONE:-} IMAGE=${IMAGE:-}
TPU_TYPE="" SLICES=1 MAX_RESTARTS=100 GRACE_SECONDS=600 FLAGS=()
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        --name=*) NAME=${1#*=} ;;
        --cluster=*) CLUSTER=${1#*=} ;;
        --project=*) PROJECT=${1#*=} ;;
        --zone=*) ZONE=${1#*=} ;;
        --tpu-type=*) TPU_TYPE=${1#*=} ;;
        --slices=*) SLICES=${1#*=} ;;
        --image=*) IMAGE=${1#*=} ;;
        --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
        --grace-seconds=*) GRACE_SECONDS=${1#*=} ;;
        --xpk-flag=*) FLAGS+=("${1#*=}") ;;
        --) shift; break ;;
        *) fail "unknown option $1" ;;
    esac
    shift
done
need --name "$NAME" "the workload's name"
need --cluster "$CLUSTER" "the cluster's name"
need --project "$PROJECT" "the Google Cloud project"
need --zone "$ZONE" "the cluster's zone"
need --tpu-type "$TPU_TYPE" "XPK's name of a slice, such as v5litepod-16"
need --image "$IMAGE" "the container image made with launch/Dockerfile"
need_number --slices "$SLICES"
need_number --max-restarts "$MAX_RESTARTS"
need_number --grace-seconds "$GRACE_SECONDS"
set_command "$@"

# XPK itself restarts after exit codes 42 and 127 to 255. Code 75 is a run that was stopped and saved, and 1 a crash.
# `exec` makes the command take the place of the shell that runs it, because XPK sends SIGTERM to that shell.
run xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" \
    "--tpu-type=$TPU_TYPE" "--num-slices=$SLICES" "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" \
    --restart-on-exit-codes=1,75 "--termination-grace-period-seconds=$GRACE_SECONDS" \
    ${FLAGS[@]+"${FLAGS[@]}"} "--command=exec $(shell_words "${COMMAND[@]}")"
