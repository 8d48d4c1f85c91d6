#!/usr/bin/env bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
# Train a model on a Slurm cluster, for as long as it takes: saved before the time limit, requeued, resumed.
#
#   bash slurm/pretrain.sh [sbatch options] [options] OVERRIDES     checks all of it here, then submits itself
#   sbatch [sbatch options] slurm/pretrain.sh [options] OVERRIDES   the same check is the job's first action
#
# example:  bash slurm/pretrain.sh --nodes=8 --time=24:00:00 +model=llama3_8b parallelism=tp2 precision=bf16
#HELP
set -uo pipefail
# sbatch runs a copy of this file from its spool folder: the rest lies where the job was submitted, or where it came from.
for lib in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}" \
  "$(dirname "$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")"; do
  [ -f "$lib/lib.sh" ] && break
done
. "$lib/lib.sh" || { echo "slurm/lib.sh not found: submit from the project's folder" >&2; exit 2; }
start_as_training nemo_llm.train "$@"
