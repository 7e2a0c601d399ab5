"""The explorer's page from web/dist into the package, with a mark of the sources that it was built from.

    python tools/explorer_page.py

`make web` runs it after the build; a test compares the mark with the sources as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "tandem" / "explore" / "page.html"


def sources_mark() -> str:
    """A line of HTML that says which sources a page was built from: a digest of all files that decide it."""
    web = ROOT / "web"
    files = [web / name for name in ("index.html", "package-lock.json", "tsconfig.json", "vite.config.ts")]
    digest = hashlib.sha256()
    for file in [*files, *sorted((web / "src").iterdir())]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"<!-- built from {digest.hexdigest()[:16]} -->\n"


def main() -> None:
    built = (ROOT / "web" / "dist" / "index.html").read_text(encoding="utf-8")
    PAGE.write_text(built.rstrip("\n") + "\n" + sources_mark(), encoding="utf-8")


if __name__ == "__main__":
    main()
