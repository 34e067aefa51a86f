#!/usr/bin/env bash
# Written by `ecdit launch` for the run in /runs/slurm_pyxis; launch again instead of editing it.
# Every rank and every life reads resolved.yaml there, so this script carries no setting of the training.
#SBATCH --job-name=ec_dit_3xl_32e
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=12:00:00
#SBATCH --partition=gpu
#SBATCH --account=research
#SBATCH --qos=normal
#SBATCH --output=/runs/slurm_pyxis/logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@600
#SBATCH --requeue

# Slurm warns this shell alone (USR2, 600 s before the limit; TERM when the job is preempted or cancelled). What comes before the
# supervisor listens is kept for it, what comes later is passed on.
early="" supervisor=""
pass_on() { if [[ -n $supervisor ]]; then kill -s "$1" "$supervisor"; else early=$1; fi; }
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM

set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1

set +u  # module scripts read unset variables
module load slurm
module load enroot
set -u

export OMP_NUM_THREADS=8
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_IB_HCA=mlx5

run=/runs/slurm_pyxis
code=/runs/slurm_pyxis/code/0123456789ab
# A launch.py or torch.py in this folder must not be imported in place of ours; a code snapshot comes before what is installed.
export PYTHONSAFEPATH=1
if [[ -n $code ]]; then export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"; fi

ECDIT_WARNED=$early /opt/ecdit/bin/python -m launch.job "$run/job.json" &
supervisor=$!
status=0
wait "$supervisor" || status=$?
while kill -0 "$supervisor" 2>/dev/null; do  # a signal ended the wait, not the supervisor
  status=0
  wait "$supervisor" || status=$?
done
exit "$status"

# /runs/slurm_pyxis/job.json
# {
#  "format": 1,
#  "run": "/runs/slurm_pyxis",
#  "code": "/runs/slurm_pyxis/code/0123456789ab",
#  "python": "python",
#  "srun": [
#   "--cpus-per-task=96",
#   "--container-image=registry.example.org#ecdit/train:0.1.0",
#   "--container-mounts=/home/me:/home/me,/runs/slurm_pyxis:/runs/slurm_pyxis,/lustre/shared/images:/lustre/shared/images",
#   "--container-workdir=/home/me"
#  ],
#  "nodes": 8,
#  "ranks_per_node": 8,
#  "gpu": true,
#  "words": [],
#  "lead": 600,
#  "lives": {
#   "without_progress": 3,
#   "total": 100,
#   "back_off": [
#    15.0,
#    60.0,
#    240.0
#   ]
#  },
#  "bad_node": "exclude",
#  "interface": null,
#  "preflight": {
#   "gpus": 8,
#   "free_bytes": 0,
#   "clock_seconds": 5.0,
#   "bandwidth": 0.0,
#   "folders": [
#    "/runs/slurm_pyxis",
#    "/lustre/shared/images",
#    "/home/me/encoders/t5",
#    "/home/me/encoders/vae"
#   ]
#  }
# }

# code: N files in /runs/slurm_pyxis/code/0123456789ab
