"""API keys: a file of `name:sha256` lines says who may ask. The keys themselves are stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from tandem.spec.errors import SpecError


def hash_key(key: str) -> str:
    """What the file holds for a key: the SHA-256 of its UTF-8 bytes, in hexadecimal. Keys must be long and random."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """Names and digests of the keys that are let in. Several keys may share a name, so that one can replace another."""

    entries: tuple[tuple[str, bytes], ...]

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKeys:
        """Read `name:sha256hex` lines; blank ones and those that begin with # are skipped. Raises SpecError."""
        file = Path(path)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as wrong:
            raise SpecError(f"api_keys={str(file)!r}: cannot be read ({wrong})") from None
        entries = []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, colon, digest = text.rpartition(":")
            try:
                raw = bytes.fromhex(digest)
            except ValueError:
                raw = b""
            if not colon or not name.strip() or len(raw) != hashlib.sha256().digest_size:
                raise SpecError(f"api_keys={str(file)!r}: line {number} must be name:sha256 in 64 hexadecimal digits")
            entries.append((name.strip(), raw))
        if not entries:
            raise SpecError(f"api_keys={str(file)!r}: holds no key, so nobody could ask; add a line name:sha256")
        return cls(tuple(entries))

    def name_of(self, key: str) -> str | None:
        """The name of a key, None for one that is not known. Takes the same time whichever entry it is, or none."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for name, expected in self.entries:
            if hmac.compare_digest(digest, expected):
                found = name
        return found
