#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, to test with. Needs root, and Debian or Ubuntu for `install`.
#
#   one_node.sh install          slurm-wlm and munge from the distribution
#   one_node.sh start FOLDER     key, configuration, state and logs go to FOLDER; prints the SLURM_CONF to export
#   one_node.sh stop FOLDER
#
# The node has two CPUs, whatever the machine has, and two partitions: a job in `high` takes it from one in `low`, which
# gets SIGTERM and 120 s to save.
set -euo pipefail

action=${1:?install, start or stop}

install() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

configure() {
  local host
  host=$(hostname -s)
  cat > "$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=6917
SlurmdPort=6918
SlurmUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=$host PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
  mkdir -p "$folder/state" "$folder/spool"
  chmod 711 "$folder"
  configure
  (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --seed-file="$folder/munged.seed" --log-file="$folder/munged.log"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld
  slurmd
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --partition low --format %t 2> /dev/null)" = idle ] && { echo "$SLURM_CONF"; return; }
    sleep 0.5
  done
  echo "the node did not come up; see $folder/slurmctld.log and slurmd.log" >&2
  return 1
}

stop() {
  for daemon in slurmd slurmctld munged; do
    if [ -f "$folder/$daemon.pid" ]; then
      kill "$(cat "$folder/$daemon.pid")" || true
    fi
  done
}

if [ "$action" != install ]; then
  folder=$(realpath -m "${2:?a folder}")
fi
"$action"
