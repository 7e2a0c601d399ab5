"""What Tandem knows of the machine that it runs on: a file in the user's data folder, which `tandem calibrate host` writes."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HOST = re.compile(r"host(-[1-9]\d*)?")


def is_host(name: str) -> bool:
    """Whether a GPU's name means this machine: `host` with all of its cores, `host-N` with N threads."""
    return _HOST.fullmatch(name) is not None


def host_name(threads: int, cores: int) -> str:
    """What this machine is called with so many threads a worker."""
    return "host" if threads == cores else f"host-{threads}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_file() -> Path:
    """Where the calibration of this machine is kept: TANDEM_DATA, else `tandem` in the user's data folder."""
    chosen = os.environ.get("TANDEM_DATA")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tandem"
    return folder / "host.json"
