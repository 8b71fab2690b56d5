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

# Made by `farspan launch slurm`; it can also be submitted by hand. Jobs of one run share a name and, as singletons,
# wait for each other: submit the script several times to continue after the time limit.
submitted=/scratch/runs/long/submitted/001
run=/scratch/runs/long
is_array=true
task_per_rank=false
num_nodes=2
ranks_per_node=8
threads_per_rank=1
host_python=/home/me/farspan/.venv/bin/python
python=/home/me/farspan/.venv/bin/python
srun=(srun --kill-on-bad-exit=1)
requeue_limits=(--requeues=20 --max-failures=3 --exclude-hours=24 --max-excluded=8)
exit_warned=75
warning_signal=USR1
