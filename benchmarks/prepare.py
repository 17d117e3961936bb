"""Compilation ahead of a GPU run, on a machine without a GPU: `benchmarks/gpu.sh --prepare`.

Builds the library for sm_90, and compiles the Triton kernels of the run's calls into a cache folder, by launches behind
a driver that launches nothing. Both are in `FOLDER`, which git ignores: copy it to the same place on the GPU machine.
Triton's cache holds for one version of Triton and one state of the sources.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.runner import ROOT, Child
from benchmarks.session import Outcome, Session

FOLDER = ROOT / "build" / "gpu"
# Of a kernel, its machine code and its metadata are enough.
_NEEDED = (".cubin", ".json")


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """The variables for the children of a run that was prepared; empty otherwise."""
    library, cache = folder / "lib" / "fpn_kernels" / "_native.so", folder / "triton"
    if cache.exists():
        relocate(cache)
    found = {"FPN_KERNELS_LIBRARY": library, "TRITON_CACHE_DIR": cache}
    return {name: str(path) for name, path in found.items() if path.exists()}


def mismatch(found: Mapping[str, Any], folder: Path = FOLDER) -> str | None:
    """Why the prepared Triton kernels do not hold for this machine, or None."""
    try:
        made = json.loads((folder / "prepared.json").read_text())
    except (OSError, ValueError):
        return "prepared by an unknown version"
    differing = [name for name in ("triton", "commit") if made.get(name) != found.get(name)]
    return "; ".join(f"prepared for {name} {made.get(name)}, this is {found.get(name)}" for name in differing) or None


def relocate(cache: Path) -> None:
    """Rewrites the absolute paths in Triton's cache, which may have been copied, and drops those of no file."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text()).get("child_paths", {})
        files = {name: group.parent / Path(path).name for name, path in paths.items()}
        group.write_text(
            json.dumps({"child_paths": {name: str(file) for name, file in files.items() if file.exists()}})
        )


def main(logs: Path, seconds: float, *, small: bool, folder: Path = FOLDER) -> int:
    """Prepares a run; `small` compiles for maps of a few pixels only, and no library. Returns the exit status."""
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"TRITON_CACHE_DIR": str(folder / "triton")}
    session = Session(logs / "prepare.json", logs, "cpu", variables=variables, dry_run=small)
    done = [small or _build(logs, deadline, folder), _compile(session, deadline, folder / "triton")]
    session.find_machine(deadline)
    found = session.document["environment"]
    (folder / "prepared.json").write_text(json.dumps({name: found[name] for name in ("triton", "torch", "commit")}))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, for triton {found['triton']}; logs in {logs}")
    return 0 if all(done) else 1


def _build(logs: Path, deadline: float, folder: Path) -> bool:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder / "lib")]
    variables = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")}
    print(f"library, for {variables['TORCH_CUDA_ARCH_LIST']}", flush=True)
    child = Child([*command, "--build-temp", str(folder) + "-temp"], logs / "build.log", variables)
    ended = child.wait(deadline)
    done = not ended and "left out" not in child.output() and "FPN_KERNELS_LIBRARY" in environment(folder)
    print("  done" if done else f"  failed: {ended or 'no library'}; {child.last_line()}", flush=True)
    return done


def _compile(session: Session, deadline: float, cache: Path) -> bool:
    session.say("Triton kernels")
    try:
        outcome, done = session.suite("prepare", deadline)[0], True
    except Outcome as failure:
        outcome, done = f"{failure.entry['status']}: {failure}", False
    for file in cache.rglob("*"):
        if file.is_file() and file.suffix not in _NEEDED:
            file.unlink()
    relocate(cache)
    kernels = sum(1 for _ in cache.rglob("*.cubin"))
    session.say(f"  {kernels} kernels; calls: {outcome}")
    return done and kernels > 0
