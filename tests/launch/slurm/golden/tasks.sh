#!/bin/bash
#SBATCH --job-name=long-10d50fee
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --gres=gpu:8
#SBATCH --time=2-00
#SBATCH --partition=long
#SBATCH --constraint=a&b
#SBATCH --account=my_project
#SBATCH --exclusive
#SBATCH --comment="two words"
#SBATCH --chdir=/home/me/farspan
#SBATCH --output=/scratch/runs/long/logs/%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --dependency=singleton

# Made by `farspan launch slurm`; it can also be submitted by hand. Jobs of one run share a name and, as singletons,
# wait for each other: submit the script several times to continue after the time limit.
submitted=/scratch/runs/long/submitted/001
run=/scratch/runs/long
is_array=false
task_per_rank=true
num_nodes=2
ranks_per_node=8
threads_per_rank=6
host_python=/home/me/farspan/.venv/bin/python
python=python3
srun=(srun --kill-on-bad-exit=1 '--container-image=my image.sqsh' nice -n 5)
requeue_limits=(--requeues=3 --max-failures=3 --exclude-hours=24 --max-excluded=8)
exit_warned=75
warning_signal=USR1
