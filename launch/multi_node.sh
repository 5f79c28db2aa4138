#!/bin/sh
# Train on many machines: run this on each of them, with the same arguments, those of `saddle train`. The dataset is
# read from, and runs are kept in, folders that all of them see.
#
#   MASTER=node1 NODES=2 launch/multi_node.sh --data=faces.lmdb --outdir=runs --preset=default --batch=512
#
#   MASTER=HOST     where the others meet; one of them. Its launcher must live as long as the job does: if it is lost
#                   all end, and the scheduler starts the job again
#   PORT=N          on MASTER [29400]
#   NODES=N|MIN:MAX machines. With MIN:MAX the run goes on with fewer when one is lost, and with more when one comes:
#                   same global batch, same samples, same draws
#   RANKS=N         processes on this host [the number of GPUs, or 1]
#   JOB=NAME        the same on all machines, another for every job [saddle]
#   RESTARTS=N      times that ranks are started again after one of them died [3]
#   ADDRESS=IPV4    of this host, where it has several and the way to MASTER is not the right one
#   DEADLINE=S      outer limit: seconds that a host whose ranks have ended waits for the others, then it ends [300]
#   SADDLE_REACH=S  seconds to wait for MASTER to be there, then exit with 2 [60]
#   PYTHON=PROGRAM  [the one of .venv beside launch/, else python3]
#
# Exit codes: as launch/single_node.sh; besides 1, after the last restart or a lost host: start it again.
set -eu
: "${MASTER:?the host where all meet}" "${NODES:?how many machines, as 4 or 2:4}"
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# Ranks that are started again must not meet at the old store, where they would find the addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Time to finish a step and save between a signal and SIGKILL. The scheduler's own grace must be longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# What each GPU was doing when a collective hangs: NCCL's flight recorder, read by `torchfrtrace`.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-${TMPDIR:-/tmp}/saddle-nccl-}"
export SADDLE_REJOIN="${DEADLINE:-300}"

"$python" -m ops.build || [ "${SADDLE_OPS:-auto}" != compiled ] || exit 2 # once per host, not once per rank
: "${RANKS:=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
# launch.ranks is torchrun, with the exit codes above. It finds out whether this host is MASTER, by which address the
# others reach it (--local-addr) and over which interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), unless they are
# given. Ranks first compare what must be the same among them.
exec "$python" -m launch.ranks --nnodes="$NODES" --nproc-per-node="$RANKS" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER:${PORT:-29400}" --rdzv-id="${JOB:-saddle}" \
    ${ADDRESS:+"--local-addr=$ADDRESS"} -m launch.train "$@"
