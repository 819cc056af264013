#!/usr/bin/env bash
# Installs Slurm (Debian or Ubuntu, as root), makes a cluster of this one machine, and runs tests/test_launch_slurm.py on
# it: a run over two ranks is queued, preempted, saved, requeued, resumed, finished and evaluated; another is cancelled;
# a sweep runs as an array. Keeps what they print in docs/slurm.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v slurmctld > /dev/null || tests/slurm/one_node.sh install
{
  slurmctld -V
  .venv/bin/python -m pytest tests/test_launch_slurm.py -s --color=no --durations=0 2>&1 \
    | sed -nE 's/^\.?([a-z0-9, -]+: (queued|job).*|saved step.*|metrics and.*|\{.*)$/\1/p; s/.*\b([0-9]+ (passed|failed).*) in .*/\1/p' \
    | sed -E 's#_[0-9]{19}##g'
} | tee docs/slurm.txt
tail -n 1 docs/slurm.txt | grep -q '^[0-9]* passed$'
