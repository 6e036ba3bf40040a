#!/usr/bin/env bash
# Asks for one or several TPU slices through a queue, and trains on every worker of all of them. `keep` does everything:
# it waits, installs and starts, and if a spot slice is taken away, it asks for a new one and continues the run.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() {
    sed -n '2,3s/^# //p' launch/queued_resources.sh
    cat <<TEXT
usage: bash launch/queued_resources.sh VERB --name=NAME --project=PROJECT --zone=ZONE [options] [-- armd train ...]
  create     ask for the slices (--topology)
  status     print the state of the request; ACTIVE means that the slices are there
  install    copy the committed state of this repository to every worker of every slice and install it there
  train      start the command after -- in the background on every worker; it is started again after a crash
  logs       follow the output of one worker
  stop       send SIGTERM on every worker; the run saves, and the next \`train\` continues it
  delete     give the slices back
  keep       do all that is needed until the run is done; meant for a small machine that stays up
options (the environment variables NAME, PROJECT, ZONE and SETUP do the same):
  --topology=v5e:4x4    generation (v4, v5e, v5p, v6e) and chips of one slice; only the number of chips counts: Google
                        chooses among the shapes that have it
  --slices=1            slices, connected by the data centre's network
  --spot                cheaper machines that may be taken away
  --runtime=VERSION     image of the machines; default: the one for the generation
  --worker=0            the worker whose output \`logs\` follows
  --extras=tpu          optional dependencies that \`install\` installs, such as tpu,tfds,wandb
  --setup=COMMAND       \`install\` runs it on every worker, e.g. to mount the folder that contains --workdir; \`keep\`
                        runs it again after a reboot, so it must do no harm if it has run before
  --max-restarts=10     restarts after a crash
  --every=60            seconds between two checks of \`keep\`
  --gcloud-flag=FLAG    one more option for gcloud's ssh and scp, e.g. --internal-ip; may be repeated
  --create-flag=FLAG    one more option for gcloud's create, e.g. --reserved; may be repeated
  --dry-run             print the commands instead of running them
Every worker must see --workdir and the data under the same name (see launch/README.md).
TEXT
}
if [ "${1:-}" = --help ]; then
    usage
    exit 0
fi
. launch/common.sh
. launch/tpu_workers.sh

NAME=${NAME:-} PROJECT=${PROJECT:-} ZONE=${ZONE:-} SETUP=${SETUP:-} EXTRAS=tpu WORKER=0 MAX_RESTARTS=10 EVERY=60
TOPOLOGY="" SLICES=1 SPOT="" RUNTIME="" FLAGS=() CREATE_FLAGS=()
VERB=${1:-}
case $VERB in
    create | status | install | train | logs | stop | delete | keep) shift ;;
    *) fail "the first word must be create, status, install, train, logs, stop, delete or keep, not \`$VERB\`" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1 ;;
        --name=*) NAME=${1#*=} ;;
        --project=*) PROJECT=${1#*=} ;;
        --zone=*) ZONE=${1#*=} ;;
        --topology=*) TOPOLOGY=${1#*=} ;;
        --slices=*) SLICES=${1#*=} ;;
        --spot) SPOT=1 ;;
        --runtime=*) RUNTIME=${1#*=} ;;
        --worker=*) WORKER=${1#*=} ;;
        --extras=*) EXTRAS=${1#*=} ;;
        --setup=*) SETUP=${1#*=} ;;
        --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
        --every=*) EVERY=${1#*=} ;;
        --gcloud-flag=*) FLAGS+=("${1#*=}") ;;
        --create-flag=*) CREATE_FLAGS+=("${1#*=}") ;;
        --) shift; break ;;
        *) fail "unknown option $1" ;;
    esac
    shift
done
need --name "$NAME" "the name of the request and of its slices"
need --project "$PROJECT" "the Google Cloud project"
need --zone "$ZONE" "the zone, such as us-west4-a"
need_number --slices "$SLICES"
need --extras "$EXTRAS" "at least tpu"
need_number --every "$EVERY"
need_number --max-restarts "$MAX_RESTARTS" 0

GROUP=queued-resources
PLACE=("--project=$PROJECT" "--zone=$ZONE")
WHERE=("${PLACE[@]}" ${FLAGS[@]+"${FLAGS[@]}"})
EVERY_WORKER=(--node=all --worker=all)

# Sets CREATE, gcloud's options for the slices.
read_topology() {
    need --topology "$TOPOLOGY" "generation and chips of one slice, such as v5e:4x4"
    local type cores image size chips=1
    case $TOPOLOGY in
        v4:*) type=v4 cores=2 image=tpu-ubuntu2204-base ;;
        v5e:*) type=v5litepod cores=1 image=v2-alpha-tpuv5-lite ;;
        v5p:*) type=v5p cores=2 image=v2-alpha-tpuv5 ;;
        v6e:*) type=v6e cores=1 image=v2-alpha-tpuv6e ;;
        *) fail "--topology=$TOPOLOGY must begin with v4:, v5e:, v5p: or v6e:" ;;
    esac
    for size in $(printf '%s' "${TOPOLOGY#*:}" | tr x ' '); do
        case $size in
            0* | *[!0-9]*) fail "--topology=$TOPOLOGY must give its chips as in v5e:4x4 or v5p:8x8x8" ;;
        esac
        chips=$((chips * size))
    done
    # The numbers in the names of v4 and v5p count cores, two per chip. Those of v5e and v6e count chips.
    CREATE=("--accelerator-type=$type-$((chips * cores))" "--runtime-version=${RUNTIME:-$image}")
    if [ "$SLICES" = 1 ]; then
        CREATE+=("--node-id=$NAME")
    else
        CREATE+=("--node-count=$SLICES" "--node-prefix=$NAME")
    fi
    if [ -n "$SPOT" ]; then
        CREATE+=(--spot)
    fi
    CREATE+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"})
}

create() {
    run gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "${CREATE[@]}"
}

state() {
    run gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format="value(state.state)"
}

# --force deletes the slices too, not only the request.
delete() {
    run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

# Prints one line per worker: `running`, `ended CODE`, `lost` if its machine was rebooted, or `new` if the command has
# never been started there.
run_status() {
    remote "if ! read -r state value 2>/dev/null <armd-jax/train.status; then echo new; elif [ \$state = ended ]; then echo ended \$value; elif kill -0 \$value 2>/dev/null; then echo running; else echo lost; fi"
}

# Checks the request and, if the slices are there, the run, and does what is needed next. If gcloud itself fails, the
# next check tries again. The first check of `keep` also starts a run that has ended: it may have been stopped, its
# mistake may have been corrected, or it may be meant to train for longer.
FIRST_CHECK=yes
check() {
    local now workers code
    now=$(state) || now=ABSENT
    echo "queued_resources: $NAME is $now" >&2
    case $now in
        ABSENT) create || true ;;
        FAILED | SUSPENDED) delete || true ;;
        ACTIVE)
            workers=$(run_status | grep -xE 'new|lost|running|ended [0-9]+' | sort -u) || return 0
            code=$(sed -n 's/^ended //p' <<<"$workers" | sort -n | tail -n 1)
            case $workers in
                new) install_workers && start_workers || true ;;
                # Started on all workers again: a worker that still runs the command refuses a second start.
                *new* | *lost*) set_up_workers && start_workers || true ;;
                *running*) ;;
                *) if [ -z "$FIRST_CHECK" ]; then exit "$code"; fi
                    install_workers && start_workers || return 0 ;;
            esac
            FIRST_CHECK=""
            ;;
    esac
}

keep() {
    if [ -n "$DRY_RUN" ]; then
        echo "# every $EVERY seconds:"
        state
        echo "# if there is no such request:"
        create
        echo "# if it is FAILED or SUSPENDED:"
        delete
        echo "# if it is ACTIVE (keep ends when every worker prints \`ended CODE\`):"
        run_status
        echo "# if every worker prints \`new\` or, at the first check, \`ended CODE\`:"
        install_workers
        echo "# and then, or if one of them prints \`lost\`, or some but not all \`new\`${SETUP:+ (after the last of the above)}:"
        start_workers
        return
    fi
    while :; do
        check
        sleep "$EVERY"
    done
}

case $VERB in
    create) read_topology; create ;;
    status) state ;;
    install) install_workers ;;
    train) set_command "$@"; start_workers ;;
    logs) follow_log ;;
    stop) stop_workers ;;
    delete) delete ;;
    keep) read_topology; set_command "$@"; keep ;;
esac
