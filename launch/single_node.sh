#!/bin/sh
# Train on all GPUs of this machine, one process per GPU. The arguments are those of `saddle train`:
#
#   launch/single_node.sh --data=faces.lmdb --outdir=runs --preset=default --batch=64
#
#   RANKS=N         processes on this host [the number of GPUs, or 1]
#   RESTARTS=N      how often all ranks are restarted after one of them died [3]
#   PYTHON=PROGRAM  [the one of .venv beside launch/, else python3]
#
# Ctrl-C, SIGTERM, SIGUSR1 and, except under nohup, a closed terminal (SIGHUP) save the state and stop the run. The same
# command resumes it. Exit codes: 0 done, 2 wrong usage or input, 3 stopped because values were not finite, 75 stopped
# by a signal with everything saved.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

"$python" -m ops.build || [ "${SADDLE_OPS:-auto}" != compiled ] || exit 2 # once, not once per rank
: "${RANKS:=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
# launch.ranks runs torchrun, and exits with the codes above. Ranks first check that code, versions, data and settings
# are the same on all of them.
exec "$python" -m launch.ranks --standalone --nproc-per-node="$RANKS" --max-restarts="${RESTARTS:-3}" \
    -m launch.train "$@"
