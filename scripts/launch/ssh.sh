#!/usr/bin/env bash
# Runs a flax-switch command in one process on each of several hosts, over ssh, in the folder of this one's name there:
#   bash scripts/launch/ssh.sh host0,host1 pretrain --config switch_base_128 --workdir /shared/runs/base-128
# All hosts must reach the first one at PORT. Ctrl-C or SIGTERM here has all processes save and leave.
# PORT: of the coordinator (8476). SETUP: a line of shell that each host runs first, such as: source .venv/bin/activate
set -euo pipefail
if (($# < 2)); then
  echo "Usage: bash scripts/launch/ssh.sh HOST[,HOST...] COMMAND [ARGUMENT...]    COMMAND is one of flax-switch, such as pretrain." >&2
  exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
port=${PORT:-8476}
folder=$(printf %q "$PWD")
command="flax-switch $(printf '%q ' "$@")--distributed --coordinator-address ${hosts[0]}:$port --num-processes ${#hosts[@]}"

stop() { # one process that hears of it is enough
  ssh "${hosts[0]}" "cd $folder && kill -TERM \$(cat .launched-$port-0)" || true
}
trap stop INT TERM

processes=()
for i in "${!hosts[@]}"; do # which run in the background, where a shell's processes do not hear Ctrl-C
  note=.launched-$port-$i
  ssh "${hosts[i]}" "cd $folder && { ${SETUP:-true}; } || exit 2
    $command --process-id $i & process=\$!
    echo \$process >$note; wait \$process; status=\$?; rm -f $note; exit \$status" </dev/null &
  processes+=($!)
done

status=0
for process in "${processes[@]}"; do
  code=0
  wait "$process" || code=$?
  while kill -0 "$process" 2>/dev/null; do # a signal has ended the wait, not the process
    code=0
    wait "$process" || code=$?
  done
  ((status)) || status=$code
done
exit "$status"
