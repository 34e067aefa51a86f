#!/usr/bin/env bash
# Written by `ecdit launch` for the run in /runs/h100_ib400; launch again instead of editing it.
# The supervisor reads job.json beside it, and every life resolved.yaml, so this script carries no setting of the training.
#SBATCH --job-name=ec_dit_xl_8e
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=1-00:00:00
#SBATCH --output=/runs/h100_ib400/logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@600
#SBATCH --requeue

# Slurm's warning (USR2, 600 s before the limit) and SIGTERM come to this shell. They are kept from here on, and told to the
# supervisor through its standard input, so that none is lost while modules are loaded or Python starts.
exec {pipe}<> <(:)  # a pipe of this shell's own
for signal in USR2 TERM INT; do trap "echo $signal >&$pipe" "$signal"; done

set -euo pipefail
run=/runs/h100_ib400

# What this node lacks another one, or this one a little later, may have. A warning ends the pause; scancel is left alone.
later() {
  echo "ecdit: on ${SLURMD_NODENAME:-this node}: $1" >&2
  if ((SLURM_RESTART_COUNT < 20)); then
    read -r -t 60 -u "$pipe" word || word=
    if [[ $word == TERM ]]; then exit 87; fi
    if scontrol requeue "${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; then exit 75; fi
  fi
  echo "ecdit: the job ends; when that is mended: sbatch $run/job.sh" >&2
  exit 87
}
: "${SLURM_RESTART_COUNT:=0}"

cd /home/me || later "its working directory is not there"

export OMP_NUM_THREADS=8
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

[[ -r $run/job.json ]] || later "$run/job.json cannot be read"
command -v /opt/ecdit/bin/python >/dev/null || later "$(printf '%s is not there' /opt/ecdit/bin/python)"
code=/runs/h100_ib400/code/0123456789ab
export PYTHONSAFEPATH=1  # a launch.py or torch.py in this folder must not be imported in place of ours; PYTHONPATH still counts
if [[ -n $code ]]; then export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"; fi

# Its exit code is the job's, and comes through a pipe too: bash forgets that of a child now and then, where signals come as it ends.
exec {told}<> <(:)
(
  trap '' USR2 TERM INT
  /opt/ecdit/bin/python -m launch.job "$run/job.json" <&"$pipe" && status=0 || status=$?
  echo "$status" >&"$told"
) &
supervisor=$!

# A trap ends `wait` early.
while kill -0 "$supervisor" 2>/dev/null; do wait "$supervisor" || true; done
trap '' USR2 TERM INT
read -r -t 1 -u "$told" status || { wait "$supervisor" && status=0 || status=$?; }
if ((status > 128)); then
  echo "ecdit: the supervisor was killed (exit code $status), and its ranks end with it; go on with: sbatch $run/job.sh" >&2
fi
exit "$status"

# /runs/h100_ib400/job.json
# {
#  "format": 1,
#  "run": "/runs/h100_ib400",
#  "code": "/runs/h100_ib400/code/0123456789ab",
#  "python": "/opt/ecdit/bin/python",
#  "srun": [
#   "--cpus-per-task=96"
#  ],
#  "nodes": 1,
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
#    "/runs/h100_ib400",
#    "/home/me/data/images"
#   ]
#  }
# }

# code: N files in /runs/h100_ib400/code/0123456789ab
