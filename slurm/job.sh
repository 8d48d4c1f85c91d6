# shellcheck shell=bash
# The job's side of lib.sh: from the allocation to a decision.

run_job() {
  NOTICE='' STEP_PID='' ATTEMPT=0 CODE=1 JOB=$SLURM_JOB_ID RESTART=${SLURM_RESTART_COUNT:-0}
  trap 'take_notice USR1' USR1
  trap 'take_notice TERM' TERM
  NODES=$SLURM_JOB_NUM_NODES
  TASKS=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  [[ $TASKS =~ ^[1-9][0-9]*$ ]] || TASKS=1
  mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  say "job $JOB, start $((RESTART + 1)), on $NODES nodes (${HOSTS[*]}), $TASKS processes each"
  set_environment
  if [ "$TRAINING" = 0 ]; then
    local nodes=1 tasks=1
    [ "$ALL_RANKS" = 0 ] || nodes=$NODES tasks=$TASKS
    export MASTER_PORT=$((20000 + (JOB * 7 + RESTART * 13) % 20000))
    cd "$SLURM_SUBMIT_DIR" || exit 2
    [[ ${TOOL[0]} != *.py ]] || TOOL[0]=$HOME_DIR/${TOOL[0]}
    srun --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task=$((CPUS * TASKS / tasks)) \
      --kill-on-bad-exit=1 "${PROGRAM_OPTIONS[@]}" "${CONTAINER_COMMAND[@]}" "$PYTHON" "${TOOL[@]}" "${OVERRIDES[@]}" &
    STEP_PID=$!
    while kill -0 "$STEP_PID" 2>/dev/null; do wait "$STEP_PID"; CODE=$?; done
    exit "$CODE"
  fi
  if [ -z "$(override run.dir)" ]; then
    OVERRIDES+=("run.dir=$SLURM_SUBMIT_DIR/runs/${SLURM_JOB_NAME:-pretrain}-$JOB")
  fi
  RUN_DIR=$(override run.dir)
  [[ $RUN_DIR == /* ]] || RUN_DIR=$SLURM_SUBMIT_DIR/$RUN_DIR
  STATE=$RUN_DIR/slurm
  local prefix=() problem
  problem=$(room_problem "$RUN_DIR")
  [ -z "$problem" ] || [ "$RESTART" != 0 ] || fail 2 "$problem"
  [ "$CONTAINER" = none ] || prefix=(srun --nodes=1 --ntasks=1 "${PROGRAM_OPTIONS[@]}" "${CONTAINER_COMMAND[@]}")
  # The same words passed before, where this is not the first start; a node count that Slurm changed is a new question.
  if [ "$RESTART" = 0 ] || [ "$(cat "$STATE/checked" 2>/dev/null)" != "$NODES $TASKS" ]; then
    check_configuration "$NODES" "$TASKS" "${prefix[@]}"
  fi
  mkdir -p "$STATE" || fail 2 "run.dir: $STATE cannot be made"
  echo "$NODES $TASKS" >"$STATE/checked"
  given_up_before
  say "logs of the ranks: $STATE/$JOB.$RESTART.*/rank_*.log"
  while :; do
    ATTEMPT=$((ATTEMPT + 1))
    attempt
    decide
  done
}

# Slurm's notice before the time limit, or a preemption: passed to the ranks, who save and end with 75.
take_notice() {
  [ -n "$NOTICE" ] || say "SIG$1: told to stop; the ranks save"
  NOTICE=$1
  pass_notice_on
}
pass_notice_on() { [ -z "$STEP_PID" ] || kill -USR1 "$STEP_PID" 2>/dev/null; }

image_digest() { # FILE_OR_NAME -> " sha256:..." of a file, nothing for a name
  [ -f "$1" ] || return 0
  local kept=$1.sha256 digest
  if [ "$kept" -nt "$1" ]; then
    digest=$(<"$kept")
  else
    digest=$(sha256sum "$1")
    # For the next job, where that folder can be written to; by a rename, for none to read half of it.
    { echo "$digest" >"$kept.$SLURM_JOB_ID" && mv "$kept.$SLURM_JOB_ID" "$kept"; } 2>/dev/null
  fi
  printf ' sha256:%s' "${digest%% *}"
}

set_environment() {
  local cache=${NEMO_LLM_CACHE:-/tmp/nemo_llm_cache_$UID}
  export HYDRA_FULL_ERROR=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=1
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}
  # Compiled kernels on the node's own disk: thousands of small files, wanted by every rank at once.
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
  CPUS=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / TASKS))}
  [ "$CPUS" -ge 1 ] || CPUS=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS} MASTER_ADDR=${HOSTS[0]}
  # Options of srun for tasks that run the program, and what stands before the program's own words.
  PROGRAM_OPTIONS=() CONTAINER_COMMAND=()
  local mounts=$HOME_DIR:$HOME_DIR,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR${MOUNTS:+,$MOUNTS} run_dir
  run_dir=$(override run.dir)
  if [[ $run_dir == /* ]]; then
    mkdir -p "$run_dir" || fail 2 "run.dir: $run_dir cannot be made"
    mounts+=,$run_dir:$run_dir
  fi
  # Into the head of the run's config.yaml.
  if [ "$CONTAINER" != none ]; then
    NEMO_LLM_IMAGE=$IMAGE$(image_digest "$IMAGE")
    export NEMO_LLM_IMAGE
  fi
  case $CONTAINER in
    pyxis)
      PROGRAM_OPTIONS=("--container-image=$IMAGE" "--container-mounts=$mounts" "--container-workdir=$SLURM_SUBMIT_DIR") ;;
    apptainer)
      CONTAINER_COMMAND=(apptainer exec --bind "$mounts" --pwd "$SLURM_SUBMIT_DIR")
      [[ $TASKS -lt 1 || -z ${SLURM_GPUS_ON_NODE:-} ]] || CONTAINER_COMMAND+=(--nv)
      CONTAINER_COMMAND+=("$IMAGE") ;;
  esac
}

# ---------------------------------------------------------------------------------------------- one attempt

attempt() { # -> CLASS CODE and what the summary says
  FOLDER=$STATE/$JOB.$RESTART.$ATTEMPT
  CLASS='' CODE=1 FIRST_RANK='' FIRST_HOST='' REASON='' BAD_NODES=''
  BEGAN=$(date -Iseconds) STEP_BEFORE=$(newest_checkpoint)
  mkdir -p "$FOLDER" || { CLASS=no_space REASON="$FOLDER cannot be made"; return; }
  [ -z "$NOTICE" ] || { CLASS=preempted CODE=$PREEMPTED REASON="SIG$NOTICE before the start"; return; }
  REASON=$(room_problem "$RUN_DIR")
  [ -z "$REASON" ] || { CLASS=no_space; return; }
  if [ "$HEALTH" = on ]; then
    check_nodes || return
  fi
  # How an earlier process ended is not how this one ends.
  rm -f "$RUN_DIR/exit.json"
  export MASTER_PORT=$((20000 + (JOB * 7 + RESTART * 13 + ATTEMPT) % 20000))
  local tasks=$TASKS program=("${CONTAINER_COMMAND[@]}" "$PYTHON" -W ignore -m "$MODULE")
  if [ "$LAUNCHER" = torchrun ]; then
    tasks=1
    program=("${CONTAINER_COMMAND[@]}" "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$TASKS"
      --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$JOB.$RESTART.$ATTEMPT"
      --max-restarts="$MAX_RETRIES" -m "$MODULE")
  fi
  say "attempt $ATTEMPT from step $STEP_BEFORE"
  srun --nodes="$NODES" --ntasks=$((NODES * tasks)) --ntasks-per-node="$tasks" --cpus-per-task=$((CPUS * TASKS / tasks)) \
    --kill-on-bad-exit=1 --wait=60 "${PROGRAM_OPTIONS[@]}" \
    bash "$LIB/rank.sh" "$FOLDER" "${program[@]}" "${OVERRIDES[@]}" >"$FOLDER/srun.log" 2>&1 &
  STEP_PID=$!
  [ -z "$NOTICE" ] || pass_notice_on # it came between the look at it and now
  wait_for_step
  classify $((NODES * tasks))
}

wait_for_step() { # a signal that is trapped ends `wait`, not the step
  watch_start "$STEP_PID" &
  while kill -0 "$STEP_PID" 2>/dev/null; do wait "$STEP_PID"; done
  STEP_PID=''
}

# Slurm can keep a step waiting without a word and for ever, seen where a node came back as the job began (22.05).
watch_start() { # process of srun: ends it where no rank has begun in time
  local until=$((SECONDS + ${NEMO_LLM_START_SECONDS:-900}))
  while ! compgen -G "$FOLDER/rank_*.host" >/dev/null; do
    kill -0 "$1" 2>/dev/null || return
    if [ "$SECONDS" -ge "$until" ]; then
      touch "$FOLDER/not_started"
      kill -TERM "$1"
      sleep 5
      kill -KILL "$1" 2>/dev/null
      return
    fi
    sleep 1
  done
}

check_nodes() { # one task a node; false and CLASS where a node is not fit
  local host words=()
  mkdir -p "$FOLDER/health"
  timeout "${NEMO_LLM_HEALTH_SECONDS:-120}" srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --wait=20 \
    "${PROGRAM_OPTIONS[@]}" "${CONTAINER_COMMAND[@]}" "$PYTHON" -m nemo_llm.health "$FOLDER/health" \
    --run-dir "$RUN_DIR" --gpus "${SLURM_GPUS_ON_NODE:-0}" >"$FOLDER/health/log" 2>&1
  [ -z "$NOTICE" ] || { CLASS=preempted CODE=$PREEMPTED REASON="SIG$NOTICE during the health check"; return 1; }
  for host in "${HOSTS[@]}"; do
    [ -s "$FOLDER/health/$host" ] && [ "$(head -n 1 "$FOLDER/health/$host")" = fit ] && continue
    words+=("$host: $(sed -n 2p "$FOLDER/health/$host" 2>/dev/null || true)")
    BAD_NODES+=${BAD_NODES:+,}$host
  done
  if [ -z "$BAD_NODES" ]; then
    if [ "$(for host in "${HOSTS[@]}"; do sed -n 3p "$FOLDER/health/$host"; done | sort -u | wc -l)" -gt 1 ]; then
      CLASS=bad_input CODE=2
      REASON="nodes differ in code or packages: $(for host in "${HOSTS[@]}"; do echo "$host $(sed -n 3p "$FOLDER/health/$host");"; done | tr '\n' ' ')"
      return 1
    fi
    return 0
  fi
  CLASS=bad_node REASON="not fit: ${words[*]}"
  return 1
}

newest_checkpoint() { # its step, 0 for none
  local marker found=0 step
  for marker in "$RUN_DIR"/checkpoints/step_*/COMPLETE; do
    [ -f "$marker" ] || continue
    step=${marker%/COMPLETE}
    step=${step##*/step_}
    # Bash evaluates $(...) within what it takes as a number: only digits of a name that others can write come so far.
    [[ $step =~ ^[0-9]{1,18}$ ]] || continue
    step=$((10#$step))
    [ "$step" -le "$found" ] || found=$step
  done
  echo "$found"
}

classify() { # tasks: from the ranks' own records, then from what is missing
  local tasks=$1 record code rank host silent='' number
  sort -n -k2 "$FOLDER"/rank_*.end >"$FOLDER/ends" 2>/dev/null
  CODE=0
  while read -r code _ rank host; do
    # torchrun ends with 0 or 1 whatever a rank's code was; the program's own word is in exit.json.
    if [ "$LAUNCHER" = torchrun ] && [ -f "$RUN_DIR/exit.json" ]; then
      code=$(sed -n 's/^ "code": \([0-9]*\),.*/\1/p' "$RUN_DIR/exit.json")
    fi
    [ "$code" != 0 ] || continue
    CODE=$code
    [ "$code" = "$PREEMPTED" ] || { FIRST_RANK=$rank FIRST_HOST=$host && break; }
  done <"$FOLDER/ends"
  for number in $(seq 0 $((tasks - 1))); do
    record=$FOLDER/$(printf 'rank_%04d' "$number")
    [ -f "$record.end" ] || silent+="${silent:+ }$number ($(cat "$record.host" 2>/dev/null || echo 'not started'))"
  done
  [ -z "$FIRST_RANK" ] || REASON=$(last_words "$FOLDER/$(printf 'rank_%04d' "$FIRST_RANK").log")
  if [ -n "$silent" ]; then
    [ -n "$FIRST_RANK" ] || CODE=137
    REASON+="${REASON:+; }no word from ranks $silent: $(grep -m 1 error "$FOLDER/srun.log")"
  fi
  case $CODE in
    0) CLASS='done' ;;
    2) CLASS=bad_input ;;
    "$PREEMPTED") CLASS=preempted ;;
    "$HANG") CLASS=hang ;;
    "$BUSY") CLASS=busy ;;
    *) CLASS=failed ;;
  esac
  # Ranks that were told to stop and did not get to their handlers, or not to the end of the save, were stopped.
  if [ -n "$NOTICE" ] && [[ $CLASS == failed || $CLASS == busy ]]; then CLASS=preempted CODE=$PREEMPTED; fi
  # On a full disk the ranks could write neither their last words nor their codes.
  if [ "$CLASS" = failed ] && [ -n "$(room_problem "$RUN_DIR")" ]; then CLASS=no_space; fi
  if [ "$CLASS" = failed ] && [ -f "$FOLDER/not_started" ]; then
    CLASS=no_start REASON="Slurm started no rank within ${NEMO_LLM_START_SECONDS:-900} s (NEMO_LLM_START_SECONDS)"
  fi
  head_log
}

last_words() { # log: the exception, else the last line
  local found
  found=$(grep -aE '^(\[rank[0-9]+\]: )?([A-Za-z_.]*(Error|Exception|Interrupt)\b|hang:|[0-9]+ problems? in)' "$1" 2>/dev/null | tail -n 1)
  [ -n "$found" ] || found=$(grep -av '^ *$' "$1" 2>/dev/null | tail -n 1)
  printf '%s' "${found:0:400}"
}

head_log() { # the first lines of every rank in one file, each line with its rank
  local log rank
  for log in "$FOLDER"/rank_*.log; do
    [ -f "$log" ] || continue
    rank=${log##*rank_}
    [[ $rank =~ ^[0-9]+\.log$ ]] || continue
    head -n "${NEMO_LLM_HEAD_LINES:-40}" "$log" | sed "s/^/${rank%.log}: /"
  done >"$FOLDER/head.log"
}

# ---------------------------------------------------------------------------------------------- the decision

decide() { # ends the job, or returns for another attempt in this allocation
  local after limit count
  after=$(newest_checkpoint)
  summary "$after"
  record_attempt "$after"
  count=$(count_retries "$after")
  case $CLASS in
    'done') exit 0 ;;
    bad_input) exit 2 ;;
    preempted) limit=$((MAX_RETRIES + 7)) ;;
    busy | no_space) limit=$((MAX_RETRIES + 3)) ;;
    *) limit=$MAX_RETRIES ;;
  esac
  if [ "$count" -gt "$limit" ]; then
    say "given up: $count attempts in a row ended ($CLASS) without a checkpoint newer than step $after."
    say "When the cause is gone, submit again with run.dir=$RUN_DIR"
    exit "$CODE"
  fi
  if [ -n "$NOTICE" ] || [[ $CLASS == preempted || $CLASS == bad_node || $CLASS == no_start ]]; then requeue; fi
  # A node may have gone without a word: Slurm says so a little later and requeues the job by itself.
  [[ $CLASS != busy && $CLASS != no_space ]] || pause "${NEMO_LLM_WAIT_SECONDS:-30}"
  [ -z "$NOTICE" ] || requeue
}

pause() { # seconds, cut short by a signal
  sleep "$1" &
  wait $!
}

summary() { # newest-checkpoint: the lines that a person reads first
  local last
  last=$(tail -n 1 "$RUN_DIR/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\).*/\1/p')
  {
    echo "---- attempt $ATTEMPT of job $JOB, start $((RESTART + 1)): $CLASS (code $CODE)"
    [ -z "$FIRST_RANK" ] || echo "first failing rank: $FIRST_RANK on $FIRST_HOST, after step ${last:-none}"
    [ -z "$REASON" ] || echo "because: $REASON"
    echo "newest checkpoint: step $1 (before: $STEP_BEFORE); logs: $FOLDER"
  } | tee "$FOLDER/summary"
}

json_text() { # as the inside of a JSON string
  printf '%s' "$1" | tr -d '\000-\010\013-\037' | tr '\n\t' '  ' | sed 's/\\/\\\\/g; s/"/\\"/g'
}

record_attempt() {
  printf '{"job": "%s", "restart": %d, "attempt": %d, "class": "%s", "code": %d, "began": "%s", "ended": "%s", "step_before": %d, "step_after": %d, "nodes": "%s", "rank": "%s", "host": "%s", "reason": "%s"}\n' \
    "$JOB" "$RESTART" "$ATTEMPT" "$CLASS" "$CODE" "$BEGAN" "$(date -Iseconds)" "$STEP_BEFORE" "$1" \
    "$(IFS=,; echo "${HOSTS[*]}")" "$FIRST_RANK" "$FIRST_HOST" "$(json_text "$REASON")" >>"$STATE/attempts.jsonl"
}

count_retries() { # newest-checkpoint: attempts, this one included, since the newest checkpoint is what it is
  local step=-1 count=0
  [ ! -f "$STATE/retries" ] || read -r step count <"$STATE/retries"
  [[ $step =~ ^[0-9]{1,18}$ && $count =~ ^[0-9]{1,9}$ ]] || step=-1 count=0
  if [ "$step" = "$1" ]; then count=$((10#$count + 1)); else count=1; fi
  # The first attempt on from a new checkpoint has made progress if it ended with a newer one than it began with.
  [ "$1" -le "$STEP_BEFORE" ] || count=0
  echo "$1 $count" >"$STATE/retries.tmp" && mv "$STATE/retries.tmp" "$STATE/retries"
  echo "$count"
}

given_up_before() { # an own submission begins to count anew; a requeue or a chained job goes on counting
  if [ "$RESTART" = 0 ] && [ "${NEMO_LLM_CHAIN:-1}" = 1 ]; then
    rm -f "$STATE/retries"
  elif [ -f "$STATE/retries" ] && [ "$(cut -d' ' -f2 "$STATE/retries")" -gt $((MAX_RETRIES + 7)) ]; then
    fail 1 "given up before: $(cat "$STATE/retries") (step and attempts); submit anew to try again"
  fi
}

requeue() { # does not return
  local state restarts
  if [ "${NEMO_LLM_CHAIN:-1}" != 1 ]; then
    say "the next job of the chain goes on"
    exit "$PREEMPTED"
  fi
  read -r state restarts < <(scontrol show job -o "$JOB" | sed -n 's/.*JobState=\([A-Z_]*\).* Restarts=\([0-9]*\).*/\1 \2/p;s/.*Restarts=\([0-9]*\).*JobState=\([A-Z_]*\).*/\2 \1/p' | head -n 1)
  # A node that the controller had lost runs on: then this job was requeued long ago and may be running elsewhere.
  if [ "$restarts" != "$RESTART" ] || [[ $state != RUNNING ]]; then
    say "Slurm itself has requeued or ended this job (state $state)"
    exit "$PREEMPTED"
  fi
  say "requeue${BAD_NODES:+ without $BAD_NODES}"
  (
    trap '' TERM # Slurm ends the processes of a requeued job, among them the one that tells of the nodes
    scontrol requeue "$JOB" || exit 1
    [ -z "$BAD_NODES" ] || leave_out_nodes
  ) || { say "Slurm does not requeue this job; submit it again with run.dir=$RUN_DIR"; exit "$PREEMPTED"; }
  pause 60
  exit "$PREEMPTED"
}

leave_out_nodes() { # possible only while the job waits again, which it does a moment after the requeue
  local try
  for try in $(seq 20); do
    ! scontrol update JobId="$JOB" ExcNodeList="$BAD_NODES" || return 0
    sleep 0.5
  done
  say "ExcNodeList could not be set ($try times)"
}
