"""Says what to install."""

from __future__ import annotations

import importlib.util

from tandem.spec.errors import SpecError


def need(*packages: str, doing: str, extra: str = "train") -> None:
    """Raise SpecError for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SpecError(f"{package} is not installed, and {doing} needs it; `pip install 'tandem-lm[{extra}]'`")
