"""Policies serve a router, a simulator and an engine alike, so they import nothing that computes or distributes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "ray", "transformers", "scipy", "fastapi", "uvicorn"}


def test_importing_all_of_sched_imports_nothing_heavy() -> None:
    found = sorted(path.stem for path in (ROOT / "tandem" / "sched").glob("*.py"))
    names = [f"tandem.sched.{name}" for name in found if name != "__init__"]
    assert {"tandem.sched.batch", "tandem.sched.route", "tandem.sched.times"} <= set(names)
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & HEAVY


def test_a_step_is_planned_without_numpy() -> None:
    code = "import sys, tandem.sched.batch, tandem.sched.prefix, tandem.sched.route\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True)
    assert "numpy" not in done.stdout.split()
