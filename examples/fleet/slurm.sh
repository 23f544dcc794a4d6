#!/bin/bash
#SBATCH --job-name=draft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# One torchrun on each host starts a process for each GPU. Two minutes before the time is up, and when the job is preempted,
# Slurm sends SIGTERM: the run writes a checkpoint and ends. A requeued job, or the same script given again, goes on from it.
#
#   sbatch examples/fleet/slurm.sh run.yaml [KEY.SUBKEY=VALUE]...
#
# run_dir, data and target must lie where all hosts see them under the same name; target.path and data.cache_dir may differ.
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Since Slurm 22.05 srun takes no --cpus-per-task from sbatch: all processes of a host would share one core.
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${GPUS:-8}" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:${PORT:-29500}" \
    -m fastdraft.cli train "$@"
