#!/usr/bin/env bash
# Checks and measures the GPU kernels on this machine, in less than nine minutes.
#
#   benchmarks/gpu.sh                       results in benchmarks/results/
#   OUT=/some/folder benchmarks/gpu.sh      results there
#   WHEELS=folder benchmarks/gpu.sh         missing packages from wheels in it, without a network
#   COMMIT=... benchmarks/gpu.sh            named in the results where the checkout has no .git
#
# A jax that is already here is used as it is; what else is missing goes into a folder of its own.
# Each part has its own process and time limit, so one that fails costs no other's numbers; rows are
# also written to standard error as they come. Exit status 0 only if every part ran and every result
# was right.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"
# torch shares the GPU with jax, which would otherwise take most of its memory at the start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
export PYTHONPATH="$PWD:$extra${PYTHONPATH:+:$PYTHONPATH}"

install() {
  local from=()
  [ -n "${WHEELS:-}" ] && from=(--no-index --find-links "$WHEELS")
  "$python" -m pip install --quiet --target "$extra" "${from[@]}" "$@" >&2
}

if ! "$python" -c "import jax" 2>/dev/null; then
  install "jax[cuda13]>=0.10" || { echo "error: jax is missing and could not be installed" >&2; exit 2; }
fi
for pair in absl:absl-py yaml:pyyaml ml_collections:ml-collections rich:rich numpy:numpy; do
  if ! "$python" -c "import ${pair%%:*}" 2>/dev/null; then
    # Without dependencies: none of them may bring another jax or numpy.
    install --no-deps "${pair#*:}" || { echo "error: cannot install ${pair#*:}" >&2; exit 2; }
  fi
done
"$python" - <<'PYTHON' || exit 2
import sys

import jax

try:
    device = jax.devices("gpu")[0]
except RuntimeError:
    sys.exit("error: jax sees no GPU")
print(f"{device.device_kind}, jax {jax.__version__}", file=sys.stderr)
PYTHON

status=0
part() {
  local name=$1 limit=$2 rounds=$3
  echo "== $name (at most $limit s)" >&2
  if ! timeout "$limit" "$python" -m experiments.benchmark --suite=kernels_gpu --only="$name" \
    --rounds="$rounds" --out="$out/gpu_$name.json" >/dev/null; then
    echo "error: part $name did not finish" >&2
    status=1
  fi
}
part correctness 150 1
part attention 160 5
part experts_forward 70 5
part decode 80 5
part tiles 60 3

"$python" - "$out" <<'PYTHON' || status=1
import json
import os
import sys
from pathlib import Path

wrong = []
for path in sorted(Path(sys.argv[1]).glob("gpu_*.json")):
    report = json.loads(path.read_text())
    report["commit"] = report["commit"] or os.environ.get("COMMIT")
    path.write_text(json.dumps(report, indent=1) + "\n")
    wrong += [row["name"] for row in report["rows"] if row.get("ok") is False]
for name in wrong:
    print(f"wrong: {name}", file=sys.stderr)
sys.exit(1 if wrong else 0)
PYTHON
exit $status
