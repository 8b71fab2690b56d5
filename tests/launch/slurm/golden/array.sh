#!/bin/bash
#SBATCH --job-name=long-10d50fee
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --chdir=/home/me/farspan
#SBATCH --output=/scratch/runs/long/%3a/logs/%A_%a.log
#SBATCH --array=0-2
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --dependency=singleton

# Made by `farspan launch slurm`; sbatch takes this file by hand too. Jobs of one run have one name and, being
# singletons, wait for each other: submit it several times to go on after the time limit.
#
# It has three parts. `job` runs once, on the first node, and starts a `task` on each node.
# A task starts its ranks, each of them as a `rank`.
set -euo pipefail

# What runs is the code and the configuration of when the job was submitted.
submitted=/scratch/runs/long/submitted/001
# Each element of the array is a run of its own.
element=$(printf %03d "$SLURM_ARRAY_TASK_ID")
config=$submitted/config_$element.toml
run=/scratch/runs/long/$element
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
logs=$run/logs/$job/$restarts
python=/home/me/farspan/.venv/bin/python

# Before the ranks start: whether the job was started too often or fails in a row. After their end: what failed and
# where, and whether the job is queued again, and without which nodes.
requeue() {
    /home/me/farspan/.venv/bin/python -m farspan.launch.slurm.requeue "$@" \
        --run="$run" --job="$job" --restarts="$restarts" --script="$submitted/job.sh" \
        --requeues=20 --max-failures=3 --exclude-hours=24 --max-excluded=8
}

case ${1:-job} in
job)
    mkdir -p "$logs/ended"
    scontrol show hostnames "$SLURM_JOB_NODELIST" >"$logs/nodes"
    export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
    # Without the second, Python would prefer code that lies in the current folder.
    export PYTHONPATH=$submitted/code PYTHONSAFEPATH=1
    requeue before || exit
    # srun does not take this over from sbatch.
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # Ranks meet on the first node, at a port that other jobs there do not have.
    read -r MASTER_ADDR <"$logs/nodes"
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
    # SLURM sends SIGTERM to every process when it ends the job: ranks save, and this shell waits for them.
    told=
    trap 'told=--told' TERM
    status=0
    srun --kill-on-bad-exit=1 bash "$submitted/job.sh" task || status=$?
    # To queue the job again ends this shell.
    trap '' TERM
    requeue after --status="$status" $told
    ;;
task)
    # SLURM's warning reaches every process: the ranks act on it, and nothing else may die of it.
    trap '' USR1
    trap : TERM
    status=0
    "$python" -m farspan.launch.torchrun --nnodes=2 --nproc-per-node=8 \
        --rdzv-backend=c10d --rdzv-id="$job-$restarts" \
        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --no-python bash "$submitted/job.sh" rank || status=$?
    echo "$SLURMD_NODENAME $HOSTNAME $status" >"$logs/ended/$SLURM_PROCID"
    # Ranks that saved after a warning: to srun that would be a failure, for which it kills those of other nodes.
    [ "$status" != 75 ] || status=0
    exit "$status"
    ;;
rank)
    # Ranks catch signals themselves; what writes their logs ends when they do.
    trap '' INT TERM
    # Output goes to a file of the rank and, with the rank before each line, into the log of the job.
    "$python" -m farspan.launch.cli train "$config" 2>&1 |
        tee -a "$logs/rank_$RANK.log" | sed -u "s/^/$RANK: /"
    ;;
esac
