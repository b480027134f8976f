#!/usr/bin/env bash
# Train on a TPU pod slice (Google Cloud), and make it again after preemption until it is done.
#
#   export TPU=vampnet ZONE=us-west4-a ACCELERATOR=v5litepod-256 VERSION=v2-alpha-tpuv5-lite
#   export SETUP='sudo mkdir -p /data && sudo mount FILESTORE:/share /data && cd /data/vampnet-jax'
#   recipes/launch/tpu_pod.sh /data/tokens --out /data/run [options of train.py]
#
# Runs on your own machine, which needs gcloud. SETUP runs on every host before training: it mounts a
# file system that all hosts share, with TOKENS and RUN, and goes to a copy of the repository there
# that was installed with `pip install -e '.[train,tpu]'`. SPOT=1 takes a preemptible slice.
set -u
: "${TPU:?}" "${ZONE:?}" "${ACCELERATOR:?}" "${VERSION:?}" "${SETUP:?}"
tpu() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
command="$SETUP && exec .venv/bin/python train.py $(printf '%q ' "$@")"

for _ in $(seq "${MAX_RESTARTS:-100}"); do
  state=$(tpu describe --format='value(state)' 2>/dev/null)
  case $state in
    READY) ;;
    "") tpu create --accelerator-type="$ACCELERATOR" --version="$VERSION" ${SPOT:+--spot} ;;
    PREEMPTED | TERMINATED | STOPPED) tpu delete --quiet; continue ;;
    *) sleep 30; continue ;;  # being made, mended or deleted
  esac
  # Every host runs the same program; the hosts find each other by the slice's metadata.
  tpu ssh --worker=all --command="$command"
  status=$?
  case $status in 0 | 2 | 130) exit "$status" ;; esac
  echo "ended with status $status; trying again in 30 s" >&2
  # What hangs waiting for a lost host must be gone before the next start.
  tpu ssh --worker=all --command="pkill -TERM -f train.py; sleep 20; pkill -KILL -f train.py; true"
  sleep 30
done
echo "started ${MAX_RESTARTS:-100} times; giving up" >&2
exit 1
