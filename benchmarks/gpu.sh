#!/usr/bin/env bash
# Build, test and measure the library on an NVIDIA GPU, within eight minutes, with the Python on the PATH (or $PYTHON)
# and no network. --prepare compiles beforehand on a machine without a GPU, --dry-run runs every part on a CPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Not `-m`: the current folder, which paths in the arguments are relative to, may hold a package of the same name.
exec "${PYTHON:-python3}" -c '
import sys
sys.path.insert(0, sys.argv.pop(1))
from benchmarks.gpu import main
sys.exit(main())
' "$root" "$@"
