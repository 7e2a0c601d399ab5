"""Recipes as YAML files: found by name, one built upon another, changed by field paths, refused where a field is unknown.

What a recipe holds is the caller's: a frozen dataclass of dataclasses, dictionaries, tuples and plain values.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tandem.spec.errors import SpecError

Kind = TypeVar("Kind")
_SUFFIX = ".yaml"
_EXTENDS = "extends"


@cache
def recipes_folder() -> Path:
    """Where the named recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names_in(folder: Path) -> tuple[str, ...]:
    """Names of the recipes in a folder."""
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in folder.glob(f"*{_SUFFIX}")))


def read_recipe(kind: type[Kind], folder: Path, name_or_path: str | Path, changes: Sequence[str] = ()) -> tuple[Kind, Path]:
    """A recipe of that kind, by its name in `folder` or its file, and the folder that it lies in.

    `changes` are `field.path=value` with the value in YAML: `batch.tokens=1000000`, `data.phases.0.until=0.5`. Raises
    SpecError for a name, a field or a value that is not known.
    """
    file = _find(str(name_or_path), folder)
    data = _read(file, folder)
    for change in changes:
        path, sign, value = change.partition("=")
        if not sign or not path:
            raise SpecError(f"{change!r}: changes are written field.path=value, for example seed=1")
        try:
            _set(data, path.split("."), yaml.safe_load(value), path)
        except yaml.YAMLError:
            raise SpecError(f"{path}={value!r}: not a YAML value") from None
    data.setdefault("name", file.name.removesuffix(_SUFFIX))
    return build(kind, data), file.parent


def build(kind: type[Kind], data: Any) -> Kind:
    """Plain data as an object of a dataclass. Raises SpecError with the path of a field that is not known or cannot be."""
    built: Kind = _build(kind, data, "")
    return built


def _find(text: str, folder: Path) -> Path:
    named = folder / f"{text}{_SUFFIX}"
    if named.is_file() and "/" not in text:
        return named
    path = Path(text).expanduser()
    if path.is_file():
        return path
    close = get_close_matches(text, names_in(folder), n=2, cutoff=0.5)
    guess = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(names_in(folder))}"
    raise SpecError(f"recipe={text!r}: no such recipe and no such file{guess}")


def _read(file: Path, folder: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe upon the one that it extends: one beside it, else the one of that name in `folder`."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as wrong:
        raise SpecError(f"{file}: cannot be read ({' '.join(str(wrong).split())})") from None
    if not isinstance(data, dict):
        raise SpecError(f"{file}: must hold the fields of a recipe")
    below = data.pop(_EXTENDS, None)
    if below is None:
        return data
    places = (place / f"{below}{_SUFFIX}" for place in (file.parent, folder))
    base = next((place for place in places if place.is_file() and place not in (file, *above)), None)
    if base is None:
        raise SpecError(
            f"{file}: {_EXTENDS}={below!r}: no recipe beside it or among {', '.join(names_in(folder))}, or it extends this one"
        )
    merged: dict[str, Any] = _merged(_read(base, folder, (*above, file)), data)
    return merged


def _merged(below: Any, above: Any) -> Any:
    """Mappings join; a mapping with the key `replace: true`, and everything else, takes the place of what was there."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if above.get("replace") is True:
        return {key: value for key, value in above.items() if key != "replace"}
    return {key: _merged(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}


def _set(data: Any, path: list[str], value: Any, whole: str) -> None:
    at = data
    for i, name in enumerate(path):
        last = i == len(path) - 1
        if isinstance(at, list):
            if not name.isdigit() or int(name) >= len(at):
                raise SpecError(f"{whole}: {'.'.join(path[:i])} has entries 0 to {len(at) - 1}, not {name!r}")
            if last:
                at[int(name)] = value
            else:
                at = at[int(name)]
        elif isinstance(at, dict):
            if last:
                at[name] = value
            else:
                at = at.setdefault(name, {})
                if at is None:
                    raise SpecError(f"{whole}: {'.'.join(path[: i + 1])} is not set, so nothing in it can be")
        else:
            raise SpecError(f"{whole}: {'.'.join(path[:i])} is {at!r} and has no fields")


def _build(kind: Any, value: Any, where: str, *, nameless: bool = False) -> Any:
    """`value` as an object of the annotated `kind`, or a SpecError that names the field's path.

    What stands in a mapping under a name of the recipe's own is `nameless`: it does not know that name.
    """
    if is_dataclass(kind):
        return _build_object(kind, value, where, nameless)
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return (
            None if value is None else _build(next(k for k in inside if k is not type(None)), value, where, nameless=nameless)
        )
    if origin is Literal:
        if value not in inside:
            raise SpecError(f"{where}={value!r}: must be one of {', '.join(map(str, inside))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SpecError(f"{where}={value!r}: must be a list")
        return tuple(_build(inside[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise SpecError(f"{where}={value!r}: must be a mapping")
        return {str(name): _build(inside[1], item, f"{where}.{name}", nameless=True) for name, item in value.items()}
    return _build_plain(kind, value, where)


def _build_plain(kind: type, value: Any, where: str) -> Any:
    if kind in (int, float) and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where}={value!r}: must be a finite number")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise SpecError(f"{where}={value!r}: must be {names[kind]}")
    return value


def _build_object(kind: Any, value: Any, where: str, nameless: bool) -> Any:
    if not isinstance(value, dict):
        raise SpecError(f"{where or 'recipe'}={value!r}: must be a mapping of fields")
    hints, names = get_type_hints(kind), [f.name for f in fields(kind)]
    for name in value:
        if name not in names:
            close = get_close_matches(str(name), names, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            place = f"{where}." if where else ""
            raise SpecError(f"{place}{name}: no such field; {guess}there are {', '.join(names)}")
    missing = [f.name for f in fields(kind) if f.name not in value and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise SpecError(f"{where + '.' if where else ''}{missing[0]}: is missing from the recipe")
    place = f"{where}." if where else ""
    built = {name: _build(hints[name], item, f"{place}{name}", nameless=nameless) for name, item in value.items()}
    try:
        return kind(**built)
    except SpecError as wrong:
        raise SpecError(f"{place}{wrong}") if nameless else wrong from None
