#!/usr/bin/env bash
#SBATCH --job-name=prepare_data
#SBATCH --nodes=1
#SBATCH --gpus-per-node=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
# Prepare training data from text; one process on one node, which starts its own workers.
#
#   bash slurm/prepare_data.sh [sbatch options] [options] ARGUMENTS     submits itself
#   sbatch [sbatch options] slurm/prepare_data.sh [options] ARGUMENTS
#
# example:  bash slurm/prepare_data.sh --cpus-per-task=32 input=DIR output_prefix=PREFIX
#HELP
set -uo pipefail
# sbatch runs a copy of this file from its spool folder: the rest lies where the job was submitted, or where it came from.
for lib in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}" \
  "$(dirname "$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")"; do
  [ -f "$lib/lib.sh" ] && break
done
. "$lib/lib.sh" || { echo "slurm/lib.sh not found: submit from the project's folder" >&2; exit 2; }
start_as_tool tools/prepare_data.py "$@"
