#!/bin/sh
# Train on many machines: run this on each of them with the same arguments, those of `saddle train`. The dataset and
# --outdir must be on a file system that all of them share.
#
#   MASTER=node1 NODES=2 launch/multi_node.sh --data=faces.lmdb --outdir=runs --preset=default --batch=512
#
#   MASTER=HOST     one of the machines, where all of them meet. If its launcher ends, all others end, and the scheduler
#                   must start the job again
#   PORT=N          port on MASTER where the launchers meet [29400]
#   NODES=N|MIN:MAX number of machines. With MIN:MAX the run goes on with fewer machines when one is lost, and with more
#                   when one joins; global batch, samples and draws stay the same
#   RANKS=N         processes on this host [the number of GPUs, or 1]
#   JOB=NAME        a name that is the same on all machines, and different for every job [saddle]
#   RESTARTS=N      how often all ranks are restarted after one of them died [3]
#   ADDRESS=IPV4    address of this host; needed if others cannot reach it at the address from which it reaches MASTER
#   DEADLINE=S      seconds that a host whose ranks have ended waits for the other hosts before it ends too [300]
#   SADDLE_REACH=S  seconds to wait until MASTER answers; after that exit with 2 [60]
#   PYTHON=PROGRAM  [the one of .venv beside launch/, else python3]
#
# Only on a network whose users you trust: whoever reaches one of the job's ports can run code as you. These are PORT on
# MASTER, and ports that the system chooses on each host, for the ranks' store, gloo and NCCL. They listen only at the
# address by which a host reaches MASTER, or at ADDRESS; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name another interface.
#
# Exit codes: those of launch/single_node.sh, and 1 after the last restart or a lost host: then start the job again.
set -eu
: "${MASTER:?the host where all meet}" "${NODES:?number of machines, as 4 or 2:4}"
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# Restarted ranks must not meet at the old store, where they would find the addresses of the ranks that ended.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds to finish a step and save, between a signal and SIGKILL. The scheduler's grace period must be longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# If a collective hangs, NCCL's flight recorder writes what each GPU was doing, for `torchfrtrace` to read.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-${TMPDIR:-/tmp}/saddle-nccl-}"
export SADDLE_REJOIN="${DEADLINE:-300}"

"$python" -m ops.build || [ "${SADDLE_OPS:-auto}" != compiled ] || exit 2 # once per host, not once per rank
: "${RANKS:=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
# launch.ranks runs torchrun, and exits with the codes above. It finds out whether this host is MASTER and, unless they
# are given, at which address the others reach it (--local-addr) and by which interface (GLOO_SOCKET_IFNAME,
# NCCL_SOCKET_IFNAME). Ranks first check that code, versions, data and settings are the same on all of them.
exec "$python" -m launch.ranks --nnodes="$NODES" --nproc-per-node="$RANKS" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER:${PORT:-29400}" --rdzv-id="${JOB:-saddle}" \
    ${ADDRESS:+"--local-addr=$ADDRESS"} -m launch.train "$@"
