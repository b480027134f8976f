#!/usr/bin/env bash
# Train on this machine (CPU, or all of its GPUs or TPU chips), and start again until it is done.
#
#   recipes/launch/one_machine.sh TOKENS --out RUN [options of train.py]
#
# After a crash or a lost machine the same command continues where the last checkpoint is. It ends
# when training has finished, when the input is bad (2), on Ctrl-C (130), when this script itself is
# asked to terminate (75), or after five crashes in a row, each within five minutes.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}

child= stopping=
ask_child() { stopping=$1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; }
trap 'ask_child 75' TERM
trap 'ask_child 130' INT

crashes=0
while true; do
  began=$SECONDS
  "$python" "$root/train.py" "$@" &
  child=$!
  [ -n "$stopping" ] && kill -TERM "$child" 2>/dev/null  # asked before the child was known
  wait "$child"
  # A signal ends `wait` before the child: wait for the child to save.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"; status=$?  # bash remembers it
  case $status in 0 | 2 | 130) exit "$status" ;; esac
  [ -n "$stopping" ] && exit "$stopping"
  if [ "$status" != 75 ]; then
    [ $((SECONDS - began)) -lt 300 ] && crashes=$((crashes + 1)) || crashes=1
    [ "$crashes" -ge 5 ] && echo "five crashes in a row; giving up" >&2 && exit "$status"
  fi
  echo "train.py ended with status $status; starting again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}" &
  child=$!
  wait "$child"
  [ -n "$stopping" ] && exit "$stopping"
done
