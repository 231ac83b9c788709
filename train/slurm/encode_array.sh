#!/bin/bash
# Encode a dataset into one latent store with a SLURM job array: every task is a plain process, and takes the units that
# no other task works on. Source, model and store must be on a file system that all nodes share.
#
#   sbatch train/slurm/encode_array.sh SOURCE --vae VAE --out STORE [any option of `latentvae encode`]
#   sbatch --array=0-31 --time=4:00:00 train/slurm/encode_array.sh ...     what sbatch is told wins over what is below
#
# Tasks may start, end, be preempted and come back at any time. Submitting the same line again continues the store, from
# the last unit that was committed; further arrays on the same store help. The image list is planned by whoever is first.
# Clocks of the nodes need not agree. A task that was killed on another node frees its units after --lease-seconds.
#
#SBATCH --job-name=latentvae-encode
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=encode_%A_%a.log

set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch train/slurm/encode_array.sh SOURCE --vae VAE --out STORE [options of latentvae encode]" >&2
    exit 2
fi

# The cores of the task, not of the node; the same number of threads in every task, since it decides the last bits.
cpus="${SLURM_CPUS_PER_TASK:-8}"
export OMP_NUM_THREADS="$cpus"
# Plain processes, even where the job is submitted from within a launcher.
unset WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE

echo "task ${SLURM_ARRAY_TASK_ID:-none} of job ${SLURM_ARRAY_JOB_ID:-none} on $(hostname), $cpus cores"
exec latentvae encode --num-workers "$cpus" "$@"
