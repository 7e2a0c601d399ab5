"""`export_plan`: the folder of an export, written whole or not at all, and never over somebody's own files."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from tandem._version import __version__
from tandem.plan.export import benchmark, dynamo, launch, llmd, ray, readme, sglang, vllm
from tandem.plan.export.job import Job, make_job
from tandem.plan.planner import Plan
from tandem.spec.errors import SpecError

MANIFEST = "tandem-export.json"
"""Lists the files of an export with their hashes: only a folder that holds these and nothing else is written over."""


def export_files(plan: Plan) -> dict[str, str]:
    """Every file of an export by its path in the folder, the manifest left out."""
    job = make_job(plan)
    files = {"README.md": readme.text(job), "nodes.env": launch.nodes_file(job), "plan.json": _plan_json(job)}
    for backend in (vllm, sglang, dynamo, llmd, ray, benchmark):
        files |= backend.files(job)
    return files


def _plan_json(job: Job) -> str:
    data = {**job.plan.recommended.to_json(), "predicted": job.predicted()}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def export_plan(plan: Plan, folder: Path) -> list[str]:
    """Write the recommended deployment for every backend into a folder; gives the paths written.

    Raises SpecError where the folder's parent is missing, or where the folder holds anything but an untouched export.
    """
    check_folder(folder)
    files = export_files(plan)
    hashes = {name: _hash(text.encode()) for name, text in files.items()}
    files[MANIFEST] = json.dumps({"tandem": __version__, "files": hashes}, indent=1) + "\n"
    try:
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as wrong:
        raise SpecError(f"--export={str(folder)!r}: cannot be written ({wrong.strerror})") from None
    try:
        for name, text in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
        fresh.chmod(0o755)
        _swap(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return sorted(files)


def _swap(fresh: Path, folder: Path) -> None:
    """Put the new folder in the old one's place; the old one comes back if that fails."""
    if not folder.exists():
        fresh.replace(folder)
        return
    old = fresh.with_name(fresh.name + ".old")
    folder.replace(old)
    try:
        fresh.replace(folder)
    except BaseException:
        old.replace(folder)
        raise
    shutil.rmtree(old)


def check_folder(folder: Path) -> None:
    """Refuse a folder that an export must not replace, before any work is done for it."""
    given = f"--export={str(folder)!r}"
    if not folder.parent.is_dir():
        raise SpecError(f"{given}: the folder {str(folder.parent)!r} does not exist; create it first")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SpecError(f"{given}: is not a folder; name one that is new or empty")
    if not folder.exists() or not any(folder.iterdir()):
        return
    known = _manifest(folder)
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST and known:
            continue
        if name not in known:
            raise SpecError(f"{given}: holds {name!r}, which no export wrote; name a folder that is new or empty")
        if path.is_symlink() or _hash(path.read_bytes()) != known[name]:
            raise SpecError(f"{given}: {name!r} was changed since it was exported; name a folder that is new or empty")


def _manifest(folder: Path) -> dict[str, str]:
    """Hashes of the files of an earlier export; nothing where there is none."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): str(value) for name, value in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
