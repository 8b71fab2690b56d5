#!/bin/bash
# A SLURM cluster of virtual nodes on this machine: cluster.sh FOLDER NODES CPUS_PER_NODE, as root.
#
# Every node has a network, hostname, process ids and /dev/shm of its own; nothing is written outside FOLDER, which has
# to be new and short (sockets). Prints "ready" when all nodes are idle, then restarts each node that its standard input
# names, and lives until that ends. Its only child is the head node:
# `SLURM_CONF=FOLDER/slurm.conf nsenter -t CHILD -a sinfo`.
set -euo pipefail
self=$(readlink -f "$0")

node() { # NAME ADDRESS: the first process of a node: its network, its slurmd, orphans reaped
    hostname "$1"
    ip link set lo up
    until [ -e "$folder/$1.linked" ]; do sleep 0.01; done
    ip addr add "$2/24" dev eth0
    ip link set eth0 up
    mount -t tmpfs tmpfs /dev/shm
    slurmd -D -N "$1" -f "$folder/slurm.conf" >"$folder/$1.out" 2>&1 &
    set +e
    while :; do wait; sleep 0.2; done
}

start_node() { # NAME
    local head pid
    head=$(readlink /proc/self/ns/net)
    rm -f "$folder/$1.linked"
    unshare --mount --net --uts --pid --fork --kill-child=KILL --mount-proc \
        bash "$self" node "$folder" "$1" "10.77.0.$((10 + ${1#n}))" </dev/null >"$folder/$1.log" 2>&1 &
    pid=$!
    until [ "$(readlink "/proc/$pid/ns/net")" != "$head" ]; do sleep 0.01; done
    ip link add "veth-$1" type veth peer name eth0 netns "$pid"
    ip link set "veth-$1" master br0 up
    touch "$folder/$1.linked"
}

configuration() { # NODES CPUS_PER_NODE
    # cred_expire: a requeued job waits that long, and 5 is the least. KillWait: seconds from SIGTERM to SIGKILL.
    # MinJobAge: how long jobs that have ended can be asked about. The rest is short waits, and no cgroups. Jobs of the
    # partition "first" send those of others back into the queue.
    cat <<EOC
ClusterName=box
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PropagateResourceLimits=NONE
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=86400
EnforcePartLimits=ALL
NodeName=n[1-$1] NodeAddr=10.77.0.[11-$((10 + $1))] CPUs=$2 RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=first Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
EOC
}

head_node() { # NODES CPUS_PER_NODE
    hostname head
    {
        echo "127.0.0.1 localhost"
        echo "10.77.0.1 head" # names of other nodes do not resolve
    } >"$folder/hosts"
    mount --bind "$folder/hosts" /etc/hosts
    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.77.0.1/24 dev br0
    ip link set br0 up
    dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
    chmod 400 "$folder/munge.key"
    munged --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munge.pid" \
        --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" </dev/null
    configuration "$1" "$2" >"$folder/slurm.conf"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld </dev/null >"$folder/slurmctld.out" 2>&1
    for number in $(seq "$1"); do start_node "n$number"; done
    for _ in $(seq 300); do
        if [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$1" ]; then
            echo ready
            while read -r name; do start_node "$name"; done
            exit
        fi
        sleep 0.1
    done
    echo "nodes are not idle after 30 s; see $folder/slurmctld.log" >&2
    exit 1
}

case $1 in
node) folder=$2 && node "$3" "$4" ;;
head) folder=$2 && head_node "$3" "$4" ;;
*)
    # munge demands that others may reach its socket's folder.
    mkdir -p "$1/state"
    chmod 755 "$1"
    exec unshare --mount --net --uts --ipc --pid --fork --kill-child=KILL --mount-proc bash "$self" head "$@"
    ;;
esac
