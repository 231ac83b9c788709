#!/bin/bash
# Train on several machines: the same line on every node, each of which runs torchrun with an elastic rendezvous.
#
#   NODES=4 MASTER=node0:29400 train/torchrun_multinode.sh --recipe f8c4_256 --set data.source=IMAGES --out RUN
#
# It takes the arguments of `latentvae train` and adds --resume auto. RUN and the images lie on a file system that all
# nodes share; the clocks of the nodes agree to a second (the rendezvous compares them).
#
# A trainer dies: torchrun starts all of them again, on all nodes, from the last checkpoint; RESTARTS times.
# An agent (torchrun) dies: its trainers die with it, and this script starts it again. The other nodes see it within ten
#   seconds, wait up to JOIN_SECONDS until all nodes are there, and go on from the last checkpoint. So does a node that
#   was started again and runs this line again. If it was the node that MASTER names, all agents start again.
# SIGTERM or SIGUSR1 to this script on one node: every trainer ends its step, one saves, and all scripts exit with 0.
#
#   NODES         number of machines
#   MASTER        host:port of the node that keeps the rendezvous
#   GPUS          trainers on this node (gpu: one for each GPU)
#   JOB           name of the run, the same on all nodes (latentvae)
#   RESTARTS      by torchrun; and how often in a row an agent may die young before this script gives up (3)
#   JOIN_SECONDS  that the nodes wait for each other (1800)
#   NODE_ADDRESS  by which the others reach this node (the one from which it reaches MASTER)

set -uo pipefail

if [ "$#" -lt 1 ] || [ -z "${NODES:-}" ] || [ -z "${MASTER:-}" ]; then
    echo "usage: NODES=N MASTER=HOST:PORT train/torchrun_multinode.sh [options of latentvae train]" >&2
    exit 2
fi
restarts="${RESTARTS:-3}"
young=120 # seconds
unset WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE
# A store of its own for every round: an agent that shares one tells its address in its first round only (torch 2.15),
# so that a node which comes back later would wait for it in vain.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun goes by the host's name, which is wrong where a node has several networks, or names that nobody resolves.
conf="join_timeout=${JOIN_SECONDS:-1800},keep_alive_interval=2,keep_alive_max_attempt=5,read_timeout=300"
options=()
master="$(getent ahosts "${MASTER%:*}" | awk '{ print $1; exit }')"
if [[ "$master" == 127.* && "$master" != "${MASTER%:*}" && "${MASTER%:*}" != localhost ]]; then
    # A host's own name, which some systems give to loopback: this is that node, and no other reaches it there.
    master="${NODE_ADDRESS:-$(hostname -I | awk '{ print $1 }')}"
    NODE_ADDRESS="$master"
fi
if command -v ip >/dev/null && [ -n "$master" ]; then
    NODE_ADDRESS="${NODE_ADDRESS:-$(ip -o route get "$master" | sed -n 's/.* src \([^ ]*\).*/\1/p')}"
    interface="$(ip -o addr | awk -v address="$NODE_ADDRESS" 'index($4, address "/") == 1 { print $2; exit }')"
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
    [ "$NODE_ADDRESS" = "$master" ] && conf="$conf,is_host=true" || conf="$conf,is_host=false"
fi
[ -z "${NODE_ADDRESS:-}" ] || options=(--local-addr "$NODE_ADDRESS")

# No trainer outlives its agent, where Linux can see to it: it would hold the GPU memory that the next one needs.
trainer=(python)
if command -v setpriv >/dev/null && setpriv --pdeathsig KILL true 2>/dev/null; then
    trainer=(setpriv --pdeathsig KILL python)
fi

agent=
stopping=
forward() { # to the trainers: of a SIGUSR1 torchrun itself would die
    stopping=1
    [ -z "$agent" ] || pkill "-$1" -P "$agent" -f "latentvae train" || true
}
trap 'forward TERM' TERM
trap 'forward USR1' USR1

deaths=0
while true; do
    began=$SECONDS
    # In a session of its own: a signal to the group of this script then reaches the trainers by `forward` alone.
    setsid python -m torch.distributed.run \
        --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts "$restarts" \
        --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${JOB:-latentvae}" --rdzv-conf "$conf" \
        ${options[@]+"${options[@]}"} --no-python "${trainer[@]}" -m latentvae train --resume auto "$@" &
    agent=$!
    wait "$agent"
    status=$?
    while kill -0 "$agent" 2>/dev/null; do # a signal ended `wait` before the agent has ended
        wait "$agent"
        status=$?
    done
    agent=
    if [ "$status" -eq 0 ] || [ -n "$stopping" ]; then
        exit "$status"
    fi
    deaths=$((SECONDS - began < young ? deaths + 1 : 0))
    if [ "$deaths" -gt "$restarts" ]; then
        echo "$(hostname): the agent ended with $status, $deaths times in a row within $young seconds: giving up" >&2
        exit "$status"
    fi
    echo "$(hostname): the agent ended with $status: starting it again" >&2
    sleep 1
done
