#!/usr/bin/env bash
# One audit over several nodes of a Slurm cluster: sbatch examples/slurm.sh /shared/checkpoint --json report.json
#
# The checkpoint must be the same file on every node: ranks compare versions, options, weights and probe before they
# begin, and a rank that differs is named. A rank that dies ends the job with its name; nothing waits for it.
#SBATCH --job-name=jacdiag
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ranks=${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-8}}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / ranks > 0 ? SLURM_CPUS_PER_TASK / ranks : 1))

# One torchrun per node; it starts the ranks. --kill-on-bad-exit: a node that fails takes the others with it.
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  -m jacdiag_cli audit "$@"
