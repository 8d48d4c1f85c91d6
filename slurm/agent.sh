# shellcheck shell=bash
# Signals for ranks that run under a torchrun agent; sourced by rank.sh and local.sh.
#
# The agent itself ends on SIGUSR1, and gives its ranks 30 seconds after SIGTERM. So the ranks are told in its place. They
# save and end with 0, on which the agent ends too (it starts ranks anew that end with a code of their own: hence the
# variable); what happened is in the run's exit.json.
export NEMO_LLM_UNDER_AGENT=1

tell_ranks() { # pid signal: of the agent, or of a container around it
  local agent=$1 inner rank ranks
  while inner=$(children_of "$agent" torch.distributed.run) && [ -n "$inner" ]; do agent=${inner%% *}; done
  ranks=$(children_of "$agent")
  [ -n "$ranks" ] || ranks=$agent # none started yet
  for rank in $ranks; do kill -s "$2" "$rank" 2>/dev/null; done
}

children_of() { # pid [word]: its children, with the word among their own words
  local child
  # shellcheck disable=SC2013  # words are wanted
  for child in $(cat "/proc/$1/task"/*/children 2>/dev/null); do
    [ -z "${2:-}" ] || tr '\0' '\n' <"/proc/$child/cmdline" 2>/dev/null | grep -qxF -- "$2" || continue
    printf '%s ' "$child"
  done
}
