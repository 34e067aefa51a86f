#!/usr/bin/env bash
# Written by `ecdit launch` for the run in /runs/h100_ib400; launch again instead of editing it.
# Every rank and every requeue reads resolved.yaml there, so this script carries no setting of the training.
#SBATCH --job-name=ec_dit_xl_8e
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=1-00:00:00
#SBATCH --output=/runs/h100_ib400/logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR2@600
#SBATCH --requeue

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

export OMP_NUM_THREADS=8
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

run=/runs/h100_ib400
restart=${SLURM_RESTART_COUNT:-0}

# Rendezvous on the first host. The port follows from job and restart, so neighbours and past lives do not collide.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint="${hosts[0]}:$((20000 + (SLURM_JOB_ID * 8 + restart) % 10000))"

# torchrun answers 1 whatever its workers answer, so a worker leaves its own exit code in this file.
export ECDIT_EXIT_FILE="$run/logs/exit-$SLURM_JOB_ID-$restart"
rm -f "$ECDIT_EXIT_FILE"

# PYTHONSAFEPATH: a launch.py or torch.py in this folder must not be imported in place of ours. PYTHONPATH still counts.
# Slurm's warning (USR2, 600 s before the limit) reaches every process of the step: torchrun must ignore it, or it dies
# of it; the ranks install their own handler, save and stop. On SIGTERM torchrun passes it on and kills what is left after
# --shutdown-timeout (30 s if not said): the ranks get as long as before the limit. The flag came in March 2026 (pytorch pull
# request 172596): torch 2.13 has it, 2.11 may refuse it.
status=0
srun \
  --cpus-per-task=96 \
  --kill-on-bad-exit=1 \
  bash -c 'trap "" USR2; export PYTHONSAFEPATH=1; exec "$@"' worker \
  python -m torch.distributed.run \
    --nnodes=1 --nproc-per-node=8 --max-restarts=0 --shutdown-timeout=600 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.$restart" --rdzv-endpoint="$endpoint" \
    -m ecdit_train.cli resume "$run" || status=$?

if [[ $status -ne 0 && -s "$ECDIT_EXIT_FILE" ]]; then
  status=$(<"$ECDIT_EXIT_FILE")
fi
if [[ $status -eq 75 ]]; then
  echo "ecdit: saved and stopped on request; putting job $SLURM_JOB_ID back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID" || echo "ecdit: requeue failed; run: sbatch $run/job.sh" >&2
fi
exit "$status"
