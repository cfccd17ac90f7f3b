#!/bin/bash
# A real SLURM on one host, for tests: munged, slurmctld and one slurmd a virtual node, without systemd, as root.
#   tools/local_slurm.sh start [nodes=2] | stop | status
# Needs Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge
# Everything lives in $SLURM_TEST_DIR (default: mffm-slurm in the temporary folder), which stop removes; besides that
# there is one marked line in /etc/hosts, removed by stop. Clients need: export SLURM_CONF=$SLURM_TEST_DIR/slurm.conf
# There is no accounting: sacct answers nothing, as on many small clusters.
set -euo pipefail
D=${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/mffm-slurm}
NODES=${2:-2}
CPUS=${SLURM_TEST_CPUS:-4}          # that each virtual node advertises; they may oversubscribe the host
PORT=${SLURM_TEST_PORT:-26817}      # slurmctld; slurmd k listens on PORT+k
MARK="# mffm-slurm"
export SLURM_CONF=$D/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

check() {
  local missing=""
  for program in munged slurmctld slurmd sbatch scontrol; do
    command -v $program >/dev/null || missing="$missing $program"
  done
  [ -z "$missing" ] || { echo "missing:$missing; apt-get install -y --no-install-recommends slurm-wlm munge" >&2; exit 1; }
  [ "$(id -u)" = 0 ] || { echo "the daemons must be started by root" >&2; exit 1; }
}

write_conf() {
  mkdir -p "$D"/{munge,state,spool,log}
  chmod 755 "$D" "$D/spool" "$D/state"
  chmod 711 "$D/munge"
  [ -s "$D/munge/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$D/munge/munge.key")
  chmod 400 "$D/munge/munge.key"
  local host memory; host=$(hostname -s); memory=$(awk '/MemTotal/{print int($2/1024*0.9)}' /proc/meminfo)
  # linuxproc, task/none, no accounting: nothing that a container lacks. An empty LaunchParameters= would not parse.
  cat >"$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$PORT
AuthType=auth/munge
AuthInfo=socket=$D/munge/munge.socket
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=5
MinJobAge=600
InactiveLimit=0
SlurmdTimeout=60
MessageTimeout=20
OverTimeLimit=0
JobRequeue=1
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
C
  local names=""
  for k in $(seq 1 "$NODES"); do
    echo "NodeName=n$k NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + k)) CPUs=$CPUS RealMemory=$memory" >>"$SLURM_CONF"
    names="$names${names:+,}n$k"; mkdir -p "$D/spool/n$k"
  done
  echo "PartitionName=debug Nodes=$names Default=YES MaxTime=INFINITE DefaultTime=10 State=UP" >>"$SLURM_CONF"
  printf '%s\n' CgroupPlugin=cgroup/v1 ConstrainCores=no ConstrainRAMSpace=no CgroupAutomount=no >"$D/cgroup.conf"
}

hosts() { # torch resolves the node names; in a container /etc/hosts is a mount that cannot be replaced, only written
  local kept; kept=$(grep -v "$MARK\$" /etc/hosts || true)
  if [ "$1" = add ]; then
    local line="127.0.0.1"; for k in $(seq 1 "$NODES"); do line="$line n$k"; done
    kept="$kept"$'\n'"$line $MARK"
  fi
  printf '%s\n' "$kept" >/etc/hosts
}

alive() { # pid file + program → its pid, if that process still is that program
  local pid; pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] && echo "$pid"
}

is_up() { # a node that has not answered yet has a star behind its state
  [ "$(timeout 5 sinfo -h -N -o '%N %t' 2>/dev/null | grep -cE ' (idle|alloc|mix|comp)$')" -ge "$NODES" ]
}

start() {
  check
  if ! alive "$D/slurmctld.pid" slurmctld >/dev/null || ! is_up; then
    write_conf; hosts add
    alive "$D/munge/munged.pid" munged >/dev/null ||
      munged --force --key-file="$D/munge/munge.key" --socket="$D/munge/munge.socket" \
        --pid-file="$D/munge/munged.pid" --log-file="$D/log/munged.log" --seed-file="$D/munge/munge.seed"
    alive "$D/slurmctld.pid" slurmctld >/dev/null || slurmctld -c
    for k in $(seq 1 "$NODES"); do alive "$D/slurmd.n$k.pid" slurmd >/dev/null || slurmd -N "n$k"; done
  fi
  for _ in $(seq 1 150); do
    if is_up; then echo "SLURM is up: export SLURM_CONF=$SLURM_CONF"; return 0; fi
    sleep 0.2
  done
  echo "SLURM did not come up; logs in $D/log" >&2
  sinfo -N -l >&2 || true; tail -n 20 "$D"/log/*.log >&2
  return 1
}

stop() {
  if alive "$D/slurmctld.pid" slurmctld >/dev/null; then
    timeout 10 scancel --full --signal=KILL --user=root 2>/dev/null || true  # running: kill the steps now
    timeout 10 scancel --user=root 2>/dev/null || true                       # pending and requeued ones
    for _ in $(seq 1 80); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  local pids="" pid file left=""
  for file in "$D"/slurmd.*.pid; do pid=$(alive "$file" slurmd) && pids="$pids $pid" || true; done
  pid=$(alive "$D/slurmctld.pid" slurmctld) && pids="$pids $pid" || true
  pid=$(alive "$D/munge/munged.pid" munged) && pids="$pids $pid" || true
  [ -z "$pids" ] || kill $pids 2>/dev/null || true
  for _ in $(seq 1 30); do
    left=""; for pid in $pids; do kill -0 "$pid" 2>/dev/null && left="$left $pid" || true; done
    [ -z "$left" ] && break; sleep 0.1
  done
  for pid in $left; do kill -9 "$pid" 2>/dev/null || true; done
  if grep -q "$MARK\$" /etc/hosts; then hosts remove; fi
  rm -rf "$D"
}

status() {
  if alive "$D/slurmctld.pid" slurmctld >/dev/null; then sinfo -N -l; squeue -l; else echo "SLURM is not running"; exit 3; fi
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  status) status ;;
  *) sed -n 2,7p "$0"; exit 2 ;;
esac
