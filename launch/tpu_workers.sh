# Sourced by tpu_vm.sh and queued_resources.sh: what both do over ssh on every worker of one or several slices. They set
#   GROUP         tpu-vm or queued-resources, the gcloud command group
#   WHERE         project and zone, as gcloud options, and options for ssh and scp
#   SETUP         a command for every worker, or nothing
#   EXTRAS        extras of setup.py, separated by commas
#   EVERY_WORKER  gcloud options that name every machine: a TPU program must start on all of them, or it hangs

remote() {
    run gcloud compute tpus "$GROUP" ssh "$NAME" "${WHERE[@]}" "${EVERY_WORKER[@]}" --command="$1"
}

# Installs the committed state of this repository, with Python and the extras, in ~/armd-jax of every worker. The images
# of TPU VMs have Python 3.10, so uv installs a newer one. The commands are joined by && because `set -e` has no effect
# inside a function whose failure the caller handles.
install_workers() {
    run mkdir -p build &&
        run git archive --format=tar.gz --output=build/armd-jax.tar.gz HEAD &&
        run gcloud compute tpus "$GROUP" scp build/armd-jax.tar.gz "$NAME:armd-jax.tar.gz" "${WHERE[@]}" "${EVERY_WORKER[@]}" &&
        remote "mkdir -p armd-jax && tar -xzf armd-jax.tar.gz -C armd-jax && cd armd-jax && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[$EXTRAS]'" &&
        set_up_workers
}

# A reboot undoes what --setup did: a folder, for example, is no longer mounted.
set_up_workers() {
    [ -z "$SETUP" ] || remote "$SETUP"
}

# Starts the run in the background, so that it outlives this connection. keep_running.sh starts it again after a crash.
start_workers() {
    remote "cd armd-jax && { PATH=\"\$PWD/.venv/bin:\$PATH\" setsid nohup bash launch/keep_running.sh --status-file=train.status --max-restarts=$MAX_RESTARTS -- $(shell_words "${COMMAND[@]}") >>train.log 2>&1 </dev/null & } && sleep 3 && tail -n 3 train.log"
}

# Sends SIGTERM on every worker and waits: armd saves and ends with code 75, and the next start continues from there.
stop_workers() {
    remote "cd armd-jax && read -r state pid <train.status && if [ \$state = running ]; then kill -TERM \$pid; while kill -0 \$pid 2>/dev/null; do sleep 1; done; fi; tail -n 3 train.log; cat train.status"
}

follow_log() {
    run gcloud compute tpus "$GROUP" ssh "$NAME" "${WHERE[@]}" "--worker=$WORKER" --command="tail -n 100 -F armd-jax/train.log"
}
