"""A run's folder: one recipe's, and one process's at a time."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.spec.catalog import read_json
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole


@contextmanager
def claimed_folder(
    out: Path, recipe: Mapping[str, Any], *, may_differ: Sequence[str] = (), holds: Sequence[str] = ()
) -> Iterator[None]:
    """The folder is this recipe's run's and no other process's while this lasts.

    Another start may state other values of the fields `may_differ` (paths). `holds` are names of what a run leaves. Raises
    SpecError where the folder holds a run of another recipe, one without its recipe, or one that is under way.
    """
    file = out / "recipe.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as wrong:
        raise SpecError(
            f"out={str(out)!r}: cannot be written ({wrong.strerror}); name a folder that you may write to"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SpecError(f"out={str(out)!r}: another process trains here; wait for it or name another folder") from None
        if file.is_file():
            changed = _changed(read_json(file), recipe, may_differ)
            if changed:
                raise SpecError(f"out={str(out)!r}: holds a run of another recipe ({changed} differs); name another folder")
        elif any((out / name).exists() for name in holds):
            raise SpecError(f"out={str(out)!r}: holds a run without its recipe.json; name another folder")
        else:
            write_whole(file, json.dumps(recipe, indent=2) + "\n")
        yield


def _changed(there: Any, mine: Any, may_differ: Sequence[str], where: str = "") -> str | None:
    """The path of the first field that differs."""
    if where in may_differ:
        return None
    if isinstance(there, dict) and isinstance(mine, dict):
        for name in {**mine, **there}:
            path = f"{where}.{name}" if where else name
            found = _changed(there.get(name), mine.get(name), may_differ, path)
            if found is not None:
                return found
        return None
    return None if there == mine else where
