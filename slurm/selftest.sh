#!/usr/bin/env bash
#SBATCH --job-name=selftest
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
# First day on a new cluster: how fast the ranks reach each other, within a node and across nodes, and whether they agree:
# 20 steps of training equal to one process, and resumed from a checkpoint.
#
#   bash slurm/selftest.sh [sbatch options] [options] ARGUMENTS     submits itself
#   sbatch [sbatch options] slurm/selftest.sh [options] ARGUMENTS
#
# example:  bash slurm/selftest.sh --nodes=2
#HELP
set -uo pipefail
# sbatch runs a copy of this file from its spool folder: the rest lies where the job was submitted, or where it came from.
for lib in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}" \
  "$(dirname "$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')")"; do
  [ -f "$lib/lib.sh" ] && break
done
. "$lib/lib.sh" || { echo "slurm/lib.sh not found: submit from the project's folder" >&2; exit 2; }
start_as_measurement nemo_llm.selftest "$@"
