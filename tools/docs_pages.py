"""Reference pages of the documentation site, made from the code when it is built: a hook of MkDocs (`mkdocs.yml`).

`cli.md` has every command with its arguments and options as they are declared, `api.md` every public name with its docstring.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.structure.files import File, Files

import tandem
from tandem.cli.app import app

CLI, API = "cli.md", "api.md"
OPTIONS = (
    "    options: {show_root_heading: true, show_root_full_path: false, heading_level: 3, show_source: false, "
    "show_labels: false}"
)


def on_files(files: Files, config: Any) -> Files:
    """Add both pages."""
    for name, text in ((CLI, cli_page()), (API, api_page())):
        files.append(File.generated(config, name, content=text))
    return files


def cli_page() -> str:
    """Every command, in the order of `tandem --help`."""
    parts = ["# Command line", "", "Made from the commands themselves. All take `--help`; most take `--json`.", ""]
    for words, command in _commands(typer.main.get_command(app), "tandem"):
        parts += [f"## {words}", "", (command.help or "").strip(), ""]
        rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        if rows:
            parts += ["| | What | Default |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(parts) + "\n"


def _commands(command: Any, words: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield words, command
        return
    for name, child in children.items():
        yield from _commands(child, f"{words} {name}")


def _row(parameter: Any) -> str:
    names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = parameter.metavar or str(parameter.name).upper()
    default = parameter.default
    told = "" if default is None or default is False or callable(default) or default == () else str(default)
    text = " ".join((getattr(parameter, "help", None) or "").split())
    return f"| `{_cell(names)}` | {_cell(text)} | {f'`{_cell(told)}`' if told else ''} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def api_page() -> str:
    """Every name of `tandem.__all__`, where it lives."""
    parts = [
        "# Python API",
        "",
        "Made from docstrings; [the Python reference](reference.md) tells how the names go together.",
        "",
    ]
    for module, names in tandem._HOME.items():
        parts += [f"## tandem.{module}", ""]
        for name in names:
            parts += [f"::: tandem.{module}.{name}", OPTIONS, ""]
    return "\n".join(parts)
