#!/usr/bin/env bash
# One task of a job step: runs COMMAND with its output in FOLDER/rank_NNNN.log and leaves in FOLDER/rank_NNNN.end
# how it ended: code, time, rank, host.
#
#   rank.sh FOLDER COMMAND ...
#
# srun ends all tasks as soon as one fails (--kill-on-bad-exit). A rank that was told to stop and has saved (code 75)
# must not end the others, who may still be writing: srun is told 0, and the job reads the codes from the files.
set -uo pipefail
[ "${1:-}" != --help ] || { sed -n 's/^# \{0,1\}//; 2,/^set/{/^set/!p}' "$0"; exit 0; }
folder=$1
shift
rank=${SLURM_PROCID:-0}
printf -v name '%s/rank_%04d' "$folder" "$rank"
child=
signalled=0
# shellcheck disable=SC2329  # called by pass_on
tell() { kill -s "$2" "$1" 2>/dev/null; }
if [[ " $* " == *" torch.distributed.run "* ]]; then
  # shellcheck source=agent.sh
  . "$(dirname "${BASH_SOURCE[0]}")/agent.sh" || exit 1
  # shellcheck disable=SC2329
  tell() { tell_ranks "$@"; }
fi
# Signals that come before the program has its handlers end it; the job knows that it sent them.
# shellcheck disable=SC2317,SC2329  # called by the traps
pass_on() {
  signalled=1
  [ -z "$child" ] || tell "$child" "$1"
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
hostname >"$name.host"
"$@" >"$name.log" 2>&1 </dev/null &
child=$!
code=127
while :; do
  signalled=0
  wait "$child"
  found=$?
  # 127 after a signal: the child had ended, and its code was read, when the signal came.
  [ "$found" = 127 ] && [ "$code" != 127 ] || code=$found
  [ "$signalled" = 1 ] || break
done
# Written beside and renamed: a full disk or a kill leaves no half line.
printf '%s %s %s %s\n' "$code" "$(date +%s.%N)" "$rank" "$(hostname)" >"$name.end.tmp" && mv "$name.end.tmp" "$name.end"
[ "$code" = 75 ] && exit 0
exit "$code"
