# shellcheck shell=bash disable=SC2154
# The body of the batch script. job.py puts a header in its place: the #SBATCH lines, and the variables that the body
# uses but does not assign (SC2154).

# The script has three parts, and calls itself. `job`, the part that sbatch runs, runs once, on the first node. It
# starts a `task` on each node, or one for each rank. A task starts one `rank` or several.
set -euo pipefail

config=$submitted/config.toml
job=$SLURM_JOB_ID
if "$is_array"; then
    # Each element of the array is a run of its own.
    element=$(printf %03d "$SLURM_ARRAY_TASK_ID")
    config=$submitted/config_$element.toml
    run=$run/$element
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
# SLURM leaves the variable out at the first start.
restarts=${SLURM_RESTART_COUNT:-0}
logs=$run/logs/$job/$restarts

# `before` the ranks start: refuse a job that was queued too often or keeps failing. `after` they ended: record failures
# and their nodes, and queue the job again if that can help, without those nodes.
requeue() {
    "$host_python" -m farspan.launch.slurm.requeue "$@" --run="$run" --job="$job" --restarts="$restarts" \
        --script="$submitted/job.sh" "${requeue_limits[@]}"
}

address_of() { # NODE
    local found
    found=$(sed -n "s/^$1 //p" "$logs/addresses")
    echo "${found:-$1}"
}

case ${1:-job} in
job)
    mkdir -p "$logs/ended"
    scontrol show hostnames "$SLURM_JOB_NODELIST" >"$logs/nodes"
    # The addresses that SLURM itself uses: names of nodes need not resolve.
    scontrol show --oneliner node "$SLURM_JOB_NODELIST" |
        sed -n 's/^NodeName=\([^ ]*\) .*NodeAddr=\([^ ]*\).*/\1 \2/p' >"$logs/addresses" || :
    export OMP_NUM_THREADS=$threads_per_rank PYTHONUNBUFFERED=1
    # The job runs the code of its submission. Without PYTHONSAFEPATH, Python would prefer code in the current folder.
    export PYTHONPATH=$submitted/code PYTHONSAFEPATH=1
    # @site@
    requeue before || exit
    # srun does not take this over from sbatch.
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # Ranks meet on the first node. The port is below those that Linux gives out by itself (32768 and up), and differs
    # between jobs that share the node, and between starts: another program may have it.
    read -r first <"$logs/nodes"
    MASTER_ADDR=$(address_of "$first")
    export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * restarts) % 12000))
    # SLURM sends SIGTERM to every process when it ends the job. The ranks save; this shell must outlive them, and bash
    # runs a trap only after the command in the foreground, srun, has ended.
    got_sigterm=
    trap 'got_sigterm=--got-sigterm' TERM
    status=0
    "${srun[@]}" bash "$submitted/job.sh" task || status=$?
    # `scontrol requeue` makes SLURM send SIGTERM to this shell, which still has to exclude nodes and to exit.
    trap '' TERM
    requeue after --status="$status" ${got_sigterm:+"$got_sigterm"}
    ;;
task)
    # SLURM sends its warning to every process of the step. Only the ranks act on it; ignored here, it is ignored in all
    # that this shell starts, until a rank installs its handler.
    trap '' "$warning_signal"
    # A handler, unlike '', is not inherited: this shell survives SIGTERM, and torchrun still gets it.
    trap : TERM
    status=0
    if "$task_per_rank"; then
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
        export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$ranks_per_node
        bash "$submitted/job.sh" rank || status=$?
    else
        # The id of the rendezvous differs between starts, so that late ranks of the last one cannot join. Without an
        # address and is_host, torchrun would resolve the name of the node.
        address=$(address_of "$SLURMD_NODENAME") is_host=0
        [ "$address" != "$MASTER_ADDR" ] || is_host=1
        # As under `farspan launch local`, ranks save and end if torchrun is killed.
        export FARSPAN_LAUNCHER=$$
        "$python" -m farspan.launch.torchrun --nnodes="$num_nodes" --nproc-per-node="$ranks_per_node" \
            --rdzv-backend=c10d --rdzv-id="$job-$restarts" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
            --rdzv-conf="is_host=$is_host" --local-addr="$address" \
            --no-python bash "$submitted/job.sh" rank || status=$?
    fi
    # Not HOSTNAME, which srun hands down from the first node.
    echo "$SLURMD_NODENAME $(uname -n) $status" >"$logs/ended/$SLURM_PROCID"
    # Ranks that saved after a warning: srun would take that for a failure and kill the tasks of other nodes.
    [ "$status" != "$exit_warned" ] || status=0
    exit "$status"
    ;;
rank)
    # The rank catches signals itself. tee and sed must live on, to write down what it prints while it saves.
    trap '' INT TERM
    # Output goes to a file of the rank and, with the rank before each line, into the log of the job. By pipefail the
    # exit status is the rank's.
    "$python" -m farspan.launch.cli train "$config" 2>&1 |
        tee -a "$logs/rank_$RANK.log" | sed -u "s/^/$RANK: /"
    ;;
esac
