#!/usr/bin/env bash
# One machine without Slurm: the same life as a job's. torchrun starts the ranks; a run that fails goes on from its
# newest checkpoint, at most --max-retries times without a newer one in between; a wrong configuration is not retried.
#
#   bash slurm/local.sh [--processes=N] [--max-retries=N] OVERRIDES
#
# example:  bash slurm/local.sh --processes=8 +model=llama3_8b parallelism=tp2 precision=bf16 run.dir=runs/a
#
# options:
#   --processes=N      ranks [the GPUs that nvidia-smi shows, else 1]
#   --max-retries=N    [3]
# environment: NEMO_LLM_PYTHON (interpreter) [.venv/bin/python, else python3].
# exit codes: 0 done, 1 failed, 2 bad configuration or input, 75 stopped by a signal and saved, 76 hang.
#HELP
set -uo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=lib.sh
. "$home/slurm/lib.sh"
python=${NEMO_LLM_PYTHON:-$([ -x "$home/.venv/bin/python" ] && echo "$home/.venv/bin/python" || echo python3)}
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HYDRA_FULL_ERROR=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
processes=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
[ "$processes" -gt 0 ] || processes=1
max_retries=3
overrides=()
run_dir=
for argument in "$@"; do
  case $argument in
    --help | -h) sed -n '/^# /,/^#HELP/{/^#HELP/q;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --processes=*) processes=${argument#*=} ;;
    --max-retries=*) max_retries=${argument#*=} ;;
    --config-dir=*) overrides+=("$argument") ;;
    -*) echo "$argument: no such option; see --help" >&2; exit 2 ;;
    run.dir=*) run_dir=$(unquoted "${argument#*=}") overrides+=("$argument") ;;
    *) overrides+=("$argument") ;;
  esac
done
for number in "$processes" "$max_retries"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "--processes and --max-retries take whole numbers, not $number" >&2; exit 2; }
done
# A run that may have to go on needs a folder that it finds again.
if [ -z "$run_dir" ]; then
  run_dir=runs/local-$(date +%Y%m%d-%H%M%S)
  overrides+=("run.dir=$run_dir")
fi
"$python" -W ignore -m nemo_llm.train "${overrides[@]}" trainer.check_only=true trainer.devices="$processes" || exit

newest() { find "$run_dir/checkpoints" -maxdepth 2 -name COMPLETE -path '*/step_*' 2>/dev/null | sort | tail -n 1; }
# shellcheck source=agent.sh
. "$home/slurm/agent.sh"
child=
told=
# shellcheck disable=SC2317,SC2329  # called by the traps
stop() {
  told=1
  [ -z "$child" ] || tell_ranks "$child" TERM
}
trap stop TERM INT USR1
failures=0
while :; do
  before=$(newest)
  rm -f "$run_dir/exit.json"
  # In a session of its own: Ctrl-C comes to this script alone.
  setsid "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" -m nemo_llm.train "${overrides[@]}" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  child=
  # torchrun ends with 1 whatever the cause; the run folder has the program's own word.
  [ ! -f "$run_dir/exit.json" ] || code=$(sed -n 's/^ "code": \([0-9]*\),.*/\1/p' "$run_dir/exit.json")
  [ -z "$told" ] || exit 75
  case $code in 0 | 2 | 75) exit "$code" ;; esac
  failures=$((failures + 1))
  [ "$(newest)" = "$before" ] || failures=1
  if [ "$failures" -gt "$max_retries" ]; then
    echo "given up: $failures attempts in a row failed (code $code) without a newer checkpoint in $run_dir" >&2
    exit "$code"
  fi
  echo "failed (code $code): on from ${before:-the beginning}" >&2
done
