"""The explorer's page: one HTML file that web/ is built into, and the same with answers inside, to be read without a server."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

MARK = '<script type="application/json" id="answers">null</script>'
"""Where the page keeps answers that came with it."""


def page() -> str:
    """As it is served: it asks `/api`."""
    return (resources.files("tandem.explore") / "page.html").read_text(encoding="utf-8")


def exported_page(answers: dict[str, Any]) -> str:
    """With answers inside. No text of theirs can end the script that holds them."""
    text = json.dumps(answers, allow_nan=False, separators=(",", ":"))
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, code)
    return page().replace(MARK, f'<script type="application/json" id="answers">{text}</script>', 1)
