#!/usr/bin/env bash
# A TPU VM slice: create it, install the checkout on every host, run the same command on all of them, delete it.
# Not run by this project's tests: it costs money. --dry_run prints every command instead.
#
#   launch/tpu_vm.sh [--dry_run] create
#   launch/tpu_vm.sh [--dry_run] install
#   launch/tpu_vm.sh [--dry_run] run ARGUMENTS OF main.py
#   launch/tpu_vm.sh [--dry_run] stop|delete
#
# Environment: TPU (name), ZONE, TYPE (accelerator type, such as v5litepod-16) and RUNTIME (software version, such as
# v2-alpha-tpuv5-lite) are needed; DISK may name a Filestore share HOST:/SHARE that is mounted as /mnt/run on every host,
# for data sets and work directories; SPOT=1 takes capacity that may be taken back.
set -euo pipefail

dry_run=0
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 1 ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
: "${TPU:?set TPU to the slice\'s name}" "${ZONE:?set ZONE, such as us-west4-a}"
what=$1
shift

gcloud_tpu() {
  local command=(gcloud compute tpus tpu-vm "$@" --zone "$ZONE")
  if ((dry_run)); then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}
on_all() {
  gcloud_tpu ssh "$TPU" --worker=all --command "$1"
}

case $what in
  create)
    : "${TYPE:?set TYPE, such as v5litepod-16}" "${RUNTIME:?set RUNTIME, such as v2-alpha-tpuv5-lite}"
    gcloud_tpu create "$TPU" --accelerator-type "$TYPE" --version "$RUNTIME" ${SPOT:+--spot}
    ;;
  install)
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    ((dry_run)) || git -C "$(dirname "$0")/.." archive --format tar.gz -o "$archive" HEAD
    gcloud_tpu scp "$archive" "$TPU:densenet_jax.tar.gz" --worker=all
    if [[ -n ${DISK:-} ]]; then
      on_all "sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/run && sudo mount $DISK /mnt/run && sudo chown \$(id -u):\$(id -g) /mnt/run && sudo chmod 750 /mnt/run"
    fi
    # Python 3.11 or newer: the images' own may be older.
    on_all "mkdir -p densenet_jax && tar -xzf densenet_jax.tar.gz -C densenet_jax && cd densenet_jax && pip install uv && python3 -m uv venv --python 3.11 && python3 -m uv pip install -r requirements.txt 'jax[tpu]'"
    ;;
  run)
    arguments=$(printf '%q ' "$@")
    on_all "cd densenet_jax && exec .venv/bin/python main.py $arguments"
    ;;
  stop)
    # SIGTERM to one process is enough: all save the same step and end.
    gcloud_tpu ssh "$TPU" --worker=0 --command "kill -TERM \$(pgrep -f '[.]venv/bin/python main.py')"
    ;;
  delete)
    gcloud_tpu delete "$TPU" --quiet
    ;;
  *)
    echo "error: $what is none of create, install, run, stop, delete." >&2
    exit 2
    ;;
esac
