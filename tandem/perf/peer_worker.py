"""Asks aiconfigurator about many deployments. Runs as a script in the peer's own environment and imports nothing of Tandem.

Standard input holds one JSON array of cases, each `{"id", "models": [names of one model], "ask": {...}}`; `ask` goes to the
peer's `cli_estimate` as it is. Standard output gets one JSON object a line: first the peer's version, then for each case its id
and either `ttft_s` and `tpot_s`, or `why` there is no answer. Exit status 3: the peer is not installed.

The peer reads a hundred YAML files for every single estimate; its version look-up and databases are kept between cases, which
changes no answer and makes it forty times quicker.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import sys
import warnings
from importlib import metadata, resources
from typing import Any


def main() -> None:
    """Answer all cases of standard input."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # the peer prints
    try:
        version = metadata.version("aiconfigurator")
        api = importlib.import_module("aiconfigurator.cli.api")
        databases = importlib.import_module("aiconfigurator.sdk.perf_database")
    except (ImportError, metadata.PackageNotFoundError):
        sys.exit(3)
    for name in ("get_database_view", "get_latest_database_version"):
        setattr(databases, name, functools.cache(getattr(databases, name)))
    configs = resources.files("aiconfigurator_core") / "model_configs"
    bundled = {entry.name.removesuffix("_config.json") for entry in configs.iterdir()}
    out.write(json.dumps({"version": version}) + "\n")
    for case in json.load(sys.stdin):
        out.write(json.dumps({"id": case["id"], **answer(api, bundled, case)}) + "\n")
        out.flush()


def answer(api: Any, bundled: set[str], case: dict[str, Any]) -> dict[str, Any]:
    """TTFT and TPOT in seconds, or why there are none; a model that the peer does not bring is not fetched from anywhere."""
    names = [name for name in case["models"] if name.replace("/", "--") in bundled]
    if not names:
        return {"why": "brings no configuration of this model"}
    try:
        found = api.cli_estimate(model_path=names[0], **case["ask"])
    except Exception as wrong:
        return {"why": f"{type(wrong).__name__}: {' '.join(str(wrong).split())}"}
    return {"ttft_s": float(found.ttft) / 1e3, "tpot_s": float(found.tpot) / 1e3}


if __name__ == "__main__":
    main()
