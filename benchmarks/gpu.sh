#!/usr/bin/env bash
# Build, test and measure the library on an NVIDIA GPU, within eight minutes, with the Python on the PATH (or $PYTHON)
# and no network. `benchmarks/gpu.sh --dry-run` walks every step on a CPU; `benchmarks/gpu.sh --help` names the options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Not `-m`: the caller's folder, against which paths in the arguments count, may hold a package of the same name.
exec "${PYTHON:-python3}" -c '
import sys
sys.path.insert(0, sys.argv.pop(1))
from benchmarks.gpu.__main__ import main
sys.exit(main())
' "$root" "$@"
