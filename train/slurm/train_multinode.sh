#!/bin/bash
# Train on several SLURM nodes, with a torchrun on each. RUN and the images lie on a file system that all nodes share.
#
#   sbatch train/slurm/train_multinode.sh --recipe f8c4_256 --set data.source=IMAGES --out RUN
#   sbatch --nodes=8 --time=12:00:00 train/slurm/train_multinode.sh ...    what sbatch is told wins over what is below
#
# It takes the options of `latentvae train` and adds --resume auto. Submit it from a clone of the repository, with the
# `python` of its environment in PATH. Three minutes before its time is over the trainers end their step, one saves, and
# the job queues itself again, until the recipe's images have been seen; so it does where a node fails or it is preempted.
# A trainer or a torchrun that dies is started again within the job (see train/torchrun_multinode.sh, and for RESTARTS,
# GPUS, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, which are passed on). `scancel` ends the job for good.
#
#SBATCH --job-name=latentvae-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train_%j.log

set -uo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch train/slurm/train_multinode.sh [options of latentvae train]" >&2
    exit 2
fi
launcher="${SLURM_SUBMIT_DIR:-.}/train/torchrun_multinode.sh" # SLURM runs a copy of this script, from elsewhere
if [ ! -x "$launcher" ]; then
    echo "there is no $launcher: submit the job from a clone of the repository" >&2
    exit 2
fi

first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export NODES="$SLURM_JOB_NUM_NODES" JOB="$SLURM_JOB_ID" MASTER="$first:$((20000 + SLURM_JOB_ID % 10000))"
export GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-gpu}}"
# The cores of one trainer; the same number of threads in every start, since it decides the last bits.
cores="${SLURM_CPUS_PER_TASK:-1}"
[[ ! "$GPUS" =~ ^[0-9]+$ ]] || cores=$((cores / GPUS))
export OMP_NUM_THREADS=$((cores > 0 ? cores : 1))

echo "job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $NODES nodes, $GPUS trainers on each, rendezvous at $MASTER"
srun --kill-on-bad-exit=0 "$launcher" "$@" &
step=$!

asked=
stop() { # srun passes the signal on to the launchers; what has not ended then continues from the checkpoint before
    asked="$1"
    kill "-$1" "$step"
    { sleep 150 && kill -KILL "$step"; } >/dev/null 2>&1 &
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

status=0
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break # else a signal ended `wait`, and not the step
done
if [ "$asked" = USR1 ]; then
    echo "the time is nearly over (the trainers ended with $status): job $JOB queues itself again"
    scontrol requeue "$JOB"
fi
exit "$status"
