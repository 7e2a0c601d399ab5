"""Compiles the C sources of this folder at first use and loads them: once per machine, then from a cache.

The shared object is kept under a name that hashes sources, flags, compiler and CPU, in TANDEM_CACHE or the user's cache
folder, and is published by renaming, so that processes which start together cannot meet a half-written file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tandem.spec.errors import Infeasible

FOLDER = Path(__file__).parent
FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-pthread")


@cache
def library() -> ctypes.CDLL | Infeasible:
    """The loaded shared object; Infeasible with the reason where it cannot be built. Never raises."""
    return load(sorted(FOLDER.glob("*.c")))


def available() -> bool | Infeasible:
    """True, or why not: without a C compiler everything works, by torch alone."""
    found = library()
    return found if isinstance(found, Infeasible) else True


def load(sources: list[Path]) -> ctypes.CDLL | Infeasible:
    """Compile these sources with the headers of this folder, unless the cache has them, and load the result."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return Infeasible("no C compiler: none of cc, gcc, clang is on PATH")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        target = cache_folder() / f"native-{_fingerprint(sources, version)}.so"
        if not target.exists():
            _compile(compiler, sources, target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as failed:
        lines = (failed.stderr or failed.stdout or "no message").strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0])
        return Infeasible(f"{compiler} does not compile Tandem's decode path: {first}")
    except OSError as failed:
        return Infeasible(f"Tandem's decode path cannot be built or loaded: {failed}")


def cache_folder() -> Path:
    """Where compiled code is kept: TANDEM_CACHE, else `tandem` in the user's cache folder."""
    chosen = os.environ.get("TANDEM_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


def _fingerprint(sources: list[Path], version: str) -> str:
    digest = hashlib.sha256("\0".join((version, *FLAGS, platform.machine(), _cpu_features())).encode())
    for path in (*sources, *sorted(FOLDER.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """What -march=native may build on: a cache folder can be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """One process per source at the same time, then the link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        objects = [folder / f"{path.stem}.o" for path in sources]
        commands = [
            [compiler, *FLAGS, f"-I{FOLDER}", "-c", str(path), "-o", str(made)]
            for path, made in zip(sources, objects, strict=True)
        ]
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        outputs = [process.communicate() for process in running]
        for process, command, (_, errors) in zip(running, commands, outputs, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
        linked = folder / target.name
        link = [compiler, *FLAGS, "-shared", *map(str, objects), "-lm", "-o", str(linked)]
        subprocess.run(link, capture_output=True, text=True, check=True)
        linked.replace(target)
