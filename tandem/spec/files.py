"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tandem.spec.errors import SpecError


def require_folder(field: str, path: Path | None) -> None:
    """Refuse a file to be written into a folder that does not exist, before any work is done for it."""
    if path is not None and not path.parent.is_dir():
        raise SpecError(f"{field}={str(path)!r}: the folder {str(path.parent)!r} does not exist; create it first")
    if path is not None and path.is_dir():
        raise SpecError(f"{field}={str(path)!r}: is a folder; name a file")


def write_whole(path: Path, content: str) -> None:
    """Write a file by renaming a finished one over it; on any failure the old content stays."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as wrong:
        raise SpecError(f"{path}: cannot be written ({wrong.strerror}); name a folder that you may write to") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
