"""A folder that appears whole or not at all, made beside where it will be; what dead processes left there is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem.spec.errors import SpecError

_SUFFIX = ".unfinished"


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, to be filled and renamed to it; gone afterwards where it was not.

    Its lock goes with the process, however that ends, so `remove_dead` knows what is in use. Raises SpecError where nothing
    can be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work, lock = _new(folder)
    except OSError as wrong:
        raise SpecError(f"{folder}: cannot be written ({wrong.strerror}); name a folder that you may write to") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def remove_dead(folder: Path) -> None:
    """Remove work folders of `folder` whose processes are gone; on a file system without locks none is."""
    with suppress(OSError):
        for work in sorted(folder.parent.iterdir()):
            if work.name.startswith(f".{folder.name}.") and work.name.endswith(_SUFFIX):
                with suppress(OSError):
                    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(work)
                    finally:
                        os.close(lock)


def _new(folder: Path) -> tuple[Path, int]:
    """A new folder, locked. Another process may find it before it is locked, and remove it: then there is a next one."""
    while True:
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=_SUFFIX))
        work.chmod(0o755)
        try:
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # Not every file system has locks.
            fcntl.flock(lock, fcntl.LOCK_EX)
        if work.is_dir():
            return work, lock
        os.close(lock)
