#!/usr/bin/env bash
# One audit shared out over the processes of this machine: one per GPU, or one per core group on a CPU.
#
#   examples/torchrun.sh checkpoint.pt --json report.json            all GPUs, or two processes where there is none
#   RANKS=4 examples/torchrun.sh checkpoint.pt
#
# Rank 0 prints and writes the one report. Every rank exits with the code of the verdict (0, 1) or 2 if one of them could
# not run; torchrun makes 1 of anything but 0, so read the verdict of --json where 1 and 2 must be told apart.
# On several machines, by hand: the same command on each, with one address for all instead of --standalone:
#   torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 -m jacdiag_cli audit ...
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
# Cores are shared out too: threads of several processes on the same core only get in each other's way.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

exec torchrun --standalone --nproc-per-node "$ranks" -m jacdiag_cli audit "$@"
