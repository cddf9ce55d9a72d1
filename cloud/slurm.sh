#!/bin/bash
#SBATCH --job-name=dialogues --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32 --time=02:00:00
# One run on 16 GPUs of two machines that share this folder: sbatch cloud/slurm.sh samsum '{"lora.r": 8}'
# A sweep, one machine a part: sbatch --nodes=1 --array=0-9 --wrap 'make sweep FILE=part-$SLURM_ARRAY_TASK_ID.json JOBS=8'
set -euo pipefail
make .venv/installed
.venv/bin/python -c 'import json, sys; from src import data, recipes; data.prepare(recipes.load(sys.argv[1], json.loads(sys.argv[2])))' "$1" "${2:-{\}}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --module src.gpus train "$1" "${2:-{\}}"
make run EXPERIMENT="$1" OVERRIDES="${2:-{\}}" GPUS=8  # finds the run trained; evaluates it on the first machine
