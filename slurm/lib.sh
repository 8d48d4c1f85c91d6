# shellcheck shell=bash
# What pretrain.sh and its siblings share; sourced by them. A job is: check, health check of the nodes, one job step
# of all ranks, and a decision from how each rank ended: done, again in this allocation, requeue, or stop.
#
# Files of a run, in <run.dir>/slurm/:
#   attempts.jsonl        one row an attempt: job, class, code, first failing rank, checkpoint before and after
#   JOB.RESTART.N/        rank_NNNN.log and .end of each rank, head.log (their first lines, merged), health/
#   retries               "STEP COUNT": attempts that ended without a checkpoint newer than STEP
LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HOME_DIR=$(dirname "$LIB")
# shellcheck disable=SC2034  # read in job.sh
PREEMPTED=75 HANG=76 BUSY=77

say() { echo "$(date +%H:%M:%S) $SCRIPT: $*"; }
fail() { # code message ...
  local code=$1
  shift
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
  exit "$code"
}

help_text() { # file: its header, with the options that all scripts share
  sed -n '/^# /,/^#HELP/{/^#HELP/q;s/^# \{0,1\}//p}' "$1"
  cat <<'HELP'

sbatch options (written --name=value, before or among the others) go to sbatch: --nodes=8 --gpus-per-node=8
--time=24:00:00 --partition=NAME --account=NAME ... Where there are no GPUs: --gpus-per-node=0 --ntasks-per-node=2.

options:
  --container=none|pyxis|apptainer  how the program runs [none; pyxis where an image is given]
  --image=FILE_OR_NAME    container image: a .sqsh file or registry name for pyxis, a .sif file for apptainer
  --mounts=SRC:DST[:ro],...  folders that the container sees, besides the project's and the run's
  --launcher=srun|torchrun  one task a GPU, or one torchrun agent a node that restarts ranks in the job [srun]
  --max-retries=N         attempts that may fail without a newer checkpoint in between [3]
  --chain=N               submit N jobs that follow each other until one is done, where requeue is not allowed
  --health=on|off         look at the nodes before the work, leave out a bad one [on]
  --dry-run               check, and print the sbatch command
  --help

environment: NEMO_LLM_PYTHON (interpreter) [.venv/bin/python, else python3; in a container python3], NEMO_LLM_SITE (a file that is sourced
first, for `module load` and defaults) [slurm/site.sh], NEMO_LLM_CONTAINER, NEMO_LLM_IMAGE, NEMO_LLM_MOUNTS,
NEMO_LLM_CACHE (folder on each node for compiled kernels) [/tmp/nemo_llm_cache_UID], NEMO_LLM_MIN_FREE_MIB (room that
the run's folder must have) [1024], NEMO_LLM_WAIT_SECONDS (before another attempt where the folder is in use or full) [30],
NEMO_LLM_START_SECONDS (in which a rank must begin, an image's download included; else the job is requeued) [900].
exit codes: 0 done, 1 failed, 2 bad configuration or input, 75 preempted and not requeued, 76 hang.
HELP
}

# ---------------------------------------------------------------------------------------------- arguments

read_arguments() { # arguments -> CONTAINER IMAGE ... SBATCH_OPTIONS OVERRIDES
  CONTAINER=${NEMO_LLM_CONTAINER:-} IMAGE=${NEMO_LLM_IMAGE:-} MOUNTS=${NEMO_LLM_MOUNTS:-}
  LAUNCHER=srun MAX_RETRIES=3 CHAIN=1 HEALTH=on DRY_RUN=0
  SBATCH_OPTIONS=() OVERRIDES=() OWN_OPTIONS=()
  local argument own
  for argument in "$@"; do
    own=1
    case $argument in
      --container=*) CONTAINER=${argument#*=} ;;
      --image=*) IMAGE=${argument#*=} ;;
      --mounts=*) MOUNTS=${argument#*=} ;;
      --launcher=*) LAUNCHER=${argument#*=} ;;
      --max-retries=*) MAX_RETRIES=${argument#*=} ;;
      --health=*) HEALTH=${argument#*=} ;;
      --chain=*) CHAIN=${argument#*=} own=0 ;;
      --dry-run) DRY_RUN=1 own=0 ;;
      --config-dir=*) OVERRIDES+=("$argument") own=0 ;;
      -*) SBATCH_OPTIONS+=("$argument") own=0 ;;
      *) OVERRIDES+=("$argument") own=0 ;;
    esac
    [ $own = 0 ] || OWN_OPTIONS+=("$argument")
  done
  [ -n "$CONTAINER" ] || CONTAINER=$([ -n "$IMAGE" ] && echo pyxis || echo none)
  one_of --container "$CONTAINER" none pyxis apptainer
  one_of --launcher "$LAUNCHER" srun torchrun
  one_of --health "$HEALTH" on off
  whole_number --max-retries "$MAX_RETRIES"
  whole_number --chain "$CHAIN"
  check_container
}

one_of() { # option value allowed ...
  local option=$1 value=$2
  shift 2
  [[ " $* " == *" $value "* ]] || fail 2 "$option=$value: choose one of $*"
}
whole_number() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "$1=$2: a whole number of at least 1"; }

check_container() {
  [ "$CONTAINER" = none ] && [ -n "$IMAGE$MOUNTS" ] && fail 2 "--image and --mounts need --container=pyxis or apptainer"
  [ "$CONTAINER" = none ] && return
  [ -n "$IMAGE" ] || fail 2 "--container=$CONTAINER needs --image=FILE_OR_NAME"
  [[ $IMAGE != /* && $IMAGE != ./* ]] || [ -e "$IMAGE" ] ||
    fail 2 "--image=$IMAGE: no such file; build it as docs/slurm.md says, or correct the path"
  local mount source
  IFS=, read -ra mounts <<<"$MOUNTS"
  for mount in "${mounts[@]}"; do
    source=${mount%%:*}
    [ -e "$source" ] || fail 2 "--mounts: $source does not exist here; make it, or correct the path"
  done
}

unquoted() { # value, as the program reads it: without Hydra's quotes around it, ~ as the home folder
  local value=$1 quote=${1:0:1}
  if [[ $value == \"*\" || $value == \'*\' ]]; then
    value=${value:1:-1}
    value=${value//\\"$quote"/"$quote"}
  fi
  # shellcheck disable=SC2088  # as the program reads paths
  [[ $value != "~/"* ]] || value=$HOME/${value#"~/"}
  printf '%s' "$value"
}

override() { # key: the last value that the command line gives it
  local found='' argument
  for argument in "${OVERRIDES[@]}"; do
    [[ ${argument#"${argument%%[!+]*}"} == "$1="* ]] && found=${argument#*=}
  done
  unquoted "$found"
}

sbatch_option() { # long short: value on our command line, else in the script's #SBATCH lines
  local found='' argument
  found=$(sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$SCRIPT_FILE" | tail -n 1)
  for argument in "${SBATCH_OPTIONS[@]}"; do
    case $argument in --"$1"=*) found=${argument#*=} ;; -"$2"?*) [ -n "$2" ] && found=${argument#-"$2"} ;; esac
  done
  printf '%s' "$found"
}

choose_python() {
  PYTHON=${NEMO_LLM_PYTHON:-}
  # In a container it is the image's own, by the image's PATH: what stands here links to what the image lacks.
  if [ -z "$PYTHON" ] && [ "$CONTAINER" = none ]; then
    PYTHON=$HOME_DIR/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=$(command -v python3)
  fi
  PYTHON=${PYTHON:-python3}
  export PYTHONPATH=$HOME_DIR${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
}

# ---------------------------------------------------------------------------------------------- the check

check_configuration() { # nodes tasks-a-node command-prefix ...: the whole configuration, without GPUs
  local nodes=$1 tasks=$2 output code
  shift 2
  output=$("$@" "$PYTHON" -W ignore -m "$MODULE" "${OVERRIDES[@]}" trainer.check_only=true \
    trainer.num_nodes="$nodes" trainer.devices="$tasks" 2>&1)
  code=$?
  [ $code != 0 ] || { tail -n 1 <<<"$output"; return 0; }
  printf '%s\n' "$output" >&2
  [ $code = 2 ] && fail 2 "refused for $nodes nodes of $tasks processes; nothing was started"
  fail 1 "the check itself failed (code $code) with $PYTHON; is the environment complete? (docs/slurm.md)"
}

room_problem() { # folder: says what is wrong with the place that the run will be written to, nothing where it is fine
  local folder=$1 free least=${NEMO_LLM_MIN_FREE_MIB:-1024}
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  [ -w "$folder" ] || { echo "run.dir: $folder cannot be written to by $(id -un); choose another run.dir" && return; }
  free=$(df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1024)}')
  [ "$free" -ge "$least" ] ||
    echo "run.dir: $folder has $free MiB free, less than $least; make room or choose another run.dir"
}

# ---------------------------------------------------------------------------------------------- submitting

submit() { # on the login node
  local nodes tasks gpus run_dir previous='' id problem
  nodes=$(sbatch_option nodes N)
  tasks=$(sbatch_option ntasks-per-node '')
  gpus=$(sbatch_option gpus-per-node '')
  [ -n "$tasks" ] || tasks=${gpus##*:}
  [[ ${nodes:-1} =~ ^[0-9]+$ ]] || fail 2 "--nodes=$nodes: give one number, the layout depends on it"
  command -v sbatch >/dev/null || fail 2 "sbatch is not here: run this on a login node (without Slurm: slurm/local.sh)"
  if [ "$TRAINING" = 1 ]; then
    if [ "$CONTAINER" = none ] || "$PYTHON" -c 'import nemo_llm.config.compose.load' 2>/dev/null; then
      check_configuration "${nodes:-1}" "${tasks:-1}"
    else
      say "no Python environment here: the configuration is checked as the job's first action"
    fi
    # Named here, so that every requeue and every job of a chain goes on in the same folder.
    if [ -z "$(override run.dir)" ]; then
      OVERRIDES+=("run.dir=$PWD/runs/$(run_name)")
    fi
    run_dir=$(override run.dir)
    problem=$(room_problem "$run_dir")
    [ -z "$problem" ] || fail 2 "$problem"
  fi
  if [ "$TRAINING" = 0 ] && [[ ${TOOL[0]} == *.py && ! -f $HOME_DIR/${TOOL[0]} ]]; then
    fail 2 "$HOME_DIR/${TOOL[0]} is not there: this version of the project has no such tool"
  fi
  local command=(sbatch --parsable "${SBATCH_OPTIONS[@]}")
  [ "$CHAIN" = 1 ] || command+=(--no-requeue)
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "${command[@]}" "$SCRIPT_FILE" "${OWN_OPTIONS[@]}" "${OVERRIDES[@]}"
    echo
    return
  fi
  "${command[@]}" --test-only "$SCRIPT_FILE" >/dev/null 2>"${TMPDIR:-/tmp}/sbatch.$$" || {
    cat "${TMPDIR:-/tmp}/sbatch.$$" >&2
    rm -f "${TMPDIR:-/tmp}/sbatch.$$"
    fail 2 "sbatch refuses this job; partitions here: $(sinfo -h -o %R | sort -u | paste -sd ' ')"
  }
  rm -f "${TMPDIR:-/tmp}/sbatch.$$"
  for _ in $(seq "$CHAIN"); do
    # A successor starts when the job before it did not end with 0 (also when a node took it along), and is
    # cancelled by Slurm when that has ended with 0.
    id=$(NEMO_LLM_CHAIN=$CHAIN "${command[@]}" ${previous:+--dependency=afternotok:$previous --kill-on-invalid-dep=yes} \
      "$SCRIPT_FILE" "${OWN_OPTIONS[@]}" "${OVERRIDES[@]}") || fail 2 "sbatch refused the job"
    id=${id%%;*}
    say "job $id submitted${previous:+, to follow $previous}"
    previous=$id
  done
  [ "$TRAINING" = 0 ] || say "run folder $run_dir; look at it with: python -m nemo_llm.runs $(dirname "$run_dir")"
}

run_name() {
  local model
  model=$(override model)
  printf '%s-%s-%04x' "${model:-$SCRIPT}" "$(date +%Y%m%d-%H%M%S)" $((RANDOM % 65536))
}

# ---------------------------------------------------------------------------------------------- ways in

start() { # arguments ...
  SCRIPT_FILE=$0
  SCRIPT=$(basename "${SLURM_JOB_NAME:-$0}" .sh)
  local argument
  for argument in "$@"; do
    [[ $argument != --help && $argument != -h ]] || { help_text "$0"; exit 0; }
  done
  # shellcheck source=/dev/null
  [ ! -f "${NEMO_LLM_SITE:-$LIB/site.sh}" ] || . "${NEMO_LLM_SITE:-$LIB/site.sh}"
  read_arguments "$@"
  choose_python
  # The batch script is the first task of its job; a script that a job's shell starts is not, and submits a job.
  if [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_TASK_PID:-}" = $$ ]; then
    # shellcheck source=job.sh
    . "$LIB/job.sh"
    run_job
  else
    SCRIPT=$(basename "$0" .sh)
    submit
  fi
}

start_as_training() { # module arguments ...: all ranks, checked, watched over
  TRAINING=1 MODULE=$1
  shift
  start "$@"
}
start_as_measurement() { # module arguments ...: all ranks, once
  read -ra TOOL <<<"-W ignore -m $1"
  TRAINING=0 ALL_RANKS=1
  shift
  start "$@"
}
start_as_tool() { # "words after python" arguments ...: one process on one node
  read -ra TOOL <<<"$1"
  TRAINING=0 ALL_RANKS=0
  shift
  start "$@"
}
