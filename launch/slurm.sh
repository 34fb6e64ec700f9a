#!/usr/bin/env bash
# A SLURM job with GPUs, one process a GPU; the processes find each other by srun's variables.
# Not run by this project's tests, which only give its variables to densenet_jax/distributed/cluster.py.
#
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 launch/slurm.sh ARGUMENTS OF main.py
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 1 launch/slurm.sh ...      # one process a node: also right
#
# The work directory has to be on a file system that all nodes share. Before the time limit, and on preemption, SLURM
# sends SIGTERM: the run saves, ends with status 130 and is requeued to go on. The same happens when a node fails.
# Environment: PYTHON (.venv/bin/python of the checkout).
#SBATCH --job-name=densenet
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
status=0
# Without --kill-on-bad-exit one dead task would leave the others waiting for SLURM's own time limit.
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" main.py "$@" || status=$?

# 130: saved on request; 1: a process was lost. Both go on from the newest checkpoint.
if ((status == 130 || status == 1)) && ((${SLURM_RESTART_COUNT:-0} < ${MOST_RESTARTS:-100})); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
