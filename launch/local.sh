#!/usr/bin/env bash
# Runs N processes on this machine as one run, as a pod does.
#
#   launch/local.sh N ARGUMENTS OF main.py
#   launch/local.sh 2 --config configs/digits.py --workdir ./runs/digits_2
#
# Each process gets an equal part of the GPUs that CUDA_VISIBLE_DEVICES names. Without GPUs each gets DEVICES fake CPU
# devices (1 where that is not set), which exchange through gloo. Ctrl-C and SIGTERM go to all of them; the exit status
# is that of the first process that fails. Environment: PYTHON (python), PORT (a free one), DEVICES (1).
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N ARGUMENTS OF main.py" >&2
  exit 2
fi
count=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
if ((${#gpus[@]} > 0 && ${#gpus[@]} < count)); then
  echo "error: $count processes can't share ${#gpus[@]} GPUs (CUDA_VISIBLE_DEVICES); start fewer." >&2
  exit 2
fi
if ((${#gpus[@]} == 0)); then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
fi

pids=()
signaled=0
stop() {
  signaled=1
  kill "${pids[@]}" 2>/dev/null || true
}
trap stop INT TERM
share=$((${#gpus[@]} / count))
for ((id = 0; id < count; id++)); do
  ((share == 0)) || export CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:id * share:share}")
  "$python" main.py "$@" --coordinator "127.0.0.1:$port" --num_processes "$count" --process_id "$id" &
  pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
  code=0
  while :; do # a trapped signal ends a wait before its process
    signaled=0
    now=0
    wait "$pid" || now=$?
    ((now == 127)) || code=$now # 127: it was waited for before
    ((signaled)) || break
  done
  ((status != 0)) || status=$code
done
exit "$status"
