#!/bin/bash
# Trains on several machines under SLURM: sbatch examples/slurm.sh recipe.toml parallel=hsdp parallel.copies=2
# The folder it is started in, the data and HASTEN_CACHE have to lie where every machine sees them.
#SBATCH --job-name=hasten
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@180
#SBATCH --requeue

set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A process that dies, or is silent for some seconds, ends the attempt; the next one goes on from the newest checkpoint.
# Three minutes before the time is up, SIGTERM lets all of them save and stop at the same step; submitted again, the
# same command goes on.
srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:29400" \
    --max-restarts=10 --monitor-interval=0.1 \
    -m hasten train "$@"
