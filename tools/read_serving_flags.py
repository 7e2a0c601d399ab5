"""Read the options of serving packages out of their published wheels, without installing or importing them.

A developer runs it when a package has a new release: `python tools/read_serving_flags.py` downloads each wheel with pip into
a temporary folder (`--wheels DIR` keeps them), parses the source files that define options with `ast`, and rewrites
`tests/plan/data/serving_flags/*.json`. Tests compare every flag and key of an export with these lists, so a renamed flag
fails there and not on somebody's cluster.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "tests" / "plan" / "data" / "serving_flags"
Source = Callable[[str], ast.Module]


class Wheel:
    """A wheel's Python files as syntax trees, and what its metadata says."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.names = self.archive.namelist()
        self.read_files: set[str] = set()
        metadata = self.text(next(n for n in self.names if n.endswith(".dist-info/METADATA")), note=False)
        head = metadata.partition("\n\n")[0]
        self.package, self.version = (re.search(rf"^{k}: (.+)$", head, re.M)[1].strip() for k in ("Name", "Version"))  # type: ignore[index]
        self.requires = re.findall(r"^Requires-Dist: (.+)$", head, re.M)
        newest = max(i.date_time for i in self.archive.infolist())
        # Reproducible builds date every file 1980 or 2020: no date of the release then.
        self.released = "{:04}-{:02}-{:02}".format(*newest[:3]) if newest[0] > 2020 else None

    def text(self, name: str, *, note: bool = True) -> str:
        """A member's text; `note` remembers it as one that the list rests on."""
        if note:
            self.read_files.add(name)
        return self.archive.read(name).decode("utf-8")

    def tree(self, name: str) -> ast.Module:
        """A member as a syntax tree."""
        return ast.parse(self.text(name))

    def under(self, folder: str, suffix: str = ".py") -> list[str]:
        """Members directly in a folder."""
        return sorted(n for n in self.names if n.startswith(folder) and "/" not in n[len(folder) :] and n.endswith(suffix))

    def first(self, *names: str) -> str:
        """The first of these members that there is: releases move files."""
        return next(n for n in names if n in self.names)

    def pin(self, package: str) -> str | None:
        """The version of another package that this one demands exactly."""
        found = (re.match(rf"{package}(?:\[[^]]*\])?==([^;,\s]+)", r) for r in self.requires)
        return next((m[1] for m in found if m), None)


# --- syntax trees ---


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """Calls of functions or methods of these names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in names:
                yield node


def texts(node: ast.AST) -> list[str]:
    """The texts that an expression is or holds; an f-string without its inserted parts."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [t for part in ast.iter_child_nodes(node) for t in texts(part)]


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    """The value of a call's keyword."""
    return next((k.value for k in call.keywords if k.arg == name), None)


def options(tree: ast.AST) -> set[str]:
    """Option strings of every `add_argument`, deprecated ones left out, and `--no-` forms of negatable booleans."""
    found: set[str] = set()
    for call in calls(tree, "add_argument"):
        action = keyword(call, "action")
        if action is not None and "Deprecated" in ast.unparse(action):
            continue
        names = [t for a in call.args for t in texts(a) if t.startswith("-")]
        named = keyword(call, "flag_name")
        names += texts(named) if named is not None else []
        found |= set(names)
        if action is not None and "BooleanOptionalAction" in ast.unparse(action):
            found |= {_negated(n) for n in names if n.startswith("--")}
    for call in calls(tree, "add_negatable_bool_argument"):
        named = keyword(call, "flag_name")
        names = texts(named) if named is not None else [t for a in call.args for t in texts(a) if t.startswith("--")][:1]
        found |= {form for n in names for form in (n, _negated(n))}
    return found


def _negated(flag: str) -> str:
    return "--no-" + flag.removeprefix("--")


def classes(tree: ast.AST) -> dict[str, dict[str, ast.AnnAssign]]:
    """Annotated fields of every class."""
    return {
        node.name: {s.target.id: s for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def literal(tree: ast.Module, name: str) -> list[str]:
    """The texts of a module's `name = Literal[...]` or `name = [...]`."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(t, ast.Name) and t.id == name for t in targets) and node.value is not None:  # type: ignore[attr-defined]
            return texts(node.value)  # type: ignore[attr-defined]
    raise LookupError(f"{name}: not in this release; read where it went")


def kebab(name: str) -> str:
    """A field's command-line form."""
    return "--" + name.replace("_", "-")


# --- packages ---


def read_vllm(w: Wheel) -> dict[str, Any]:
    """`vllm serve`: engine and server options, engine fields, formats, connectors, environment variables."""
    engine = w.tree("vllm/engine/arg_utils.py")
    server = w.tree(w.first("vllm/entrypoints/common/cli_args.py", "vllm/entrypoints/launchers/cli_args.py"))
    flags = options(engine) | options(server)
    configs: dict[str, dict[str, ast.AnnAssign]] = {}
    for name in w.under("vllm/config/"):
        configs |= classes(w.tree(name))
    groups = {  # the name of the variable that get_kwargs(Config) went into -> Config
        t.id: texts_of_name(node.value.args[0])
        for node in ast.walk(engine)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and calls_name(node.value) == "get_kwargs"
        for t in node.targets
        if isinstance(t, ast.Name)
    }
    for call in calls(engine, "add_argument"):
        for part in (p for k in call.keywords if k.arg is None for p in ast.walk(k.value)):
            if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name):  # **group_kwargs["field"]
                field = configs.get(groups.get(part.value.id, ""), {}).get(texts(part.slice)[0])
                if field is not None and re.search(r"\bbool\b", ast.unparse(field.annotation)):
                    flags |= {_negated(t) for a in call.args for t in texts(a) if t.startswith("--")}
    for name, fields in classes(server).items():
        if name.endswith("FrontendArgs"):
            flags |= {kebab(f) for f in fields}
    engine_classes = classes(engine)
    cache, transfer = w.tree("vllm/config/cache.py"), w.tree("vllm/config/kv_transfer.py")
    quantization = w.tree("vllm/model_executor/layers/quantization/__init__.py")
    connectors = [
        t
        for c in calls(w.tree("vllm/distributed/kv_transfer/kv_connector/factory.py"), "register_connector")
        for t in texts(c.args[0])
    ]
    return {
        "flags": flags,
        "engine_fields": {*engine_classes["EngineArgs"], *engine_classes["AsyncEngineArgs"]},
        "kv_cache_dtype": literal(cache, "CacheDType"),
        "mamba_ssm_cache_dtype": literal(cache, "MambaDType"),
        "quantization": literal(quantization, "QuantizationMethods"),
        "kv_transfer_config": classes(transfer)["KVTransferConfig"],
        "kv_role": {*literal(transfer, "KVProducer"), *literal(transfer, "KVConsumer")},
        "kv_connector": connectors,
        "environment": {t for t in texts(w.tree("vllm/envs.py")) if re.fullmatch(r"VLLM_[A-Z0-9_]+", t)},
    }


def texts_of_name(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def calls_name(node: ast.Call) -> str:
    """The name of what is called."""
    return texts_of_name(node.func)


def read_sglang(w: Wheel) -> dict[str, Any]:
    """`sglang.launch_server`: options derived from annotated fields and those added by hand."""
    flags = options(w.tree("sglang/srt/server_args.py"))
    choices: dict[str, list[str]] = {}
    named = w.tree("sglang/srt/arg_groups/choices.py")
    for name in w.under("sglang/srt/arg_groups/fields/"):
        for fields in classes(w.tree(name)).values():
            for field, node in fields.items():
                flags |= _sglang_field(field, node.annotation)
                choice = next((keyword(c, "choices") for c in calls(node.annotation, "Arg")), None)
                if choice is not None and field in (
                    "kv_cache_dtype",
                    "quantization",
                    "mamba_ssm_dtype",
                    "disaggregation_transfer_backend",
                ):
                    choices[field] = literal(named, choice.id) if isinstance(choice, ast.Name) else texts(choice)
                elif field == "disaggregation_mode":
                    choices[field] = [t for t in texts(node.annotation) if re.fullmatch("[a-z]+", t)]
    return {"flags": flags, **choices}


def _sglang_field(field: str, annotation: ast.expr) -> set[str]:
    """Option strings of one `field: A[type, Arg(...)]`."""
    if not (isinstance(annotation, ast.Subscript) and texts_of_name(annotation.value) in ("A", "Annotated")):
        return set()
    arg = next(calls(annotation, "Arg"), None)
    if arg is None:
        return {kebab(field)}
    hidden, name, aliases = keyword(arg, "no_cli"), keyword(arg, "cli_name"), keyword(arg, "aliases")
    if isinstance(hidden, ast.Constant) and hidden.value:
        return set()
    found = set(texts(name)) if name is not None else {kebab(field)}
    found |= set(texts(aliases)) if aliases is not None else set()
    action = keyword(arg, "action")
    if action is not None and "BooleanOptionalAction" in ast.unparse(action):
        found |= {_negated(f) for f in found}
    return set() if action is not None and "Deprecated" in ast.unparse(action) else found


def read_router(folder: str) -> Callable[[Wheel], dict[str, Any]]:
    """The options of sglang-router or vllm-router: both keep them in router_args.py."""

    def read(w: Wheel) -> dict[str, Any]:
        tree = w.tree(f"{folder}/router_args.py")
        policies = next(c for c in calls(tree, "add_argument") if any(t == "--policy" for a in c.args for t in texts(a)))
        choice = keyword(policies, "choices")
        return {"flags": options(tree), "policy": texts(choice) if choice is not None else []}

    return read


def read_dynamo(w: Wheel) -> dict[str, Any]:
    """Options of dynamo.vllm, dynamo.sglang and dynamo.frontend beyond their engines', and the graph deployment's schema."""
    common = {o for n in w.under("dynamo/common/configuration/groups/") for o in options(w.tree(n))}
    schema = classes(w.tree("dynamo/profiler/utils/config.py"))
    kinds = ("Config", "Metadata", "Spec", "Component", "MultinodeConfig", "PodTemplate", "PodSpec", "Container")
    aliases = {"component_type": "type"}
    templates = [n for n in w.names if re.match(r"dynamo/profiler/templates/dgd/(vllm|sglang)/\w+\.yaml$", n)]
    types = {t for n in templates for t in re.findall(r"^    type: (\w+)$", w.text(n), re.M)}
    images = {t for n in templates for t in re.findall(r"image: (\S+)$", w.text(n), re.M)}
    return {
        "frontend": options(w.tree("dynamo/frontend/frontend_args.py")) | common,
        "vllm": options(w.tree("dynamo/vllm/backend_args.py")) | common,
        "sglang": options(w.tree("dynamo/sglang/backend_args.py")) | common,
        "schema": {k: sorted(aliases.get(f, f) for f in schema[k] if f != "model_config") for k in kinds},
        "api": sorted(t for t in texts(w.tree("dynamo/profiler/utils/config.py")) if t.startswith("nvidia.com/v")),
        "component_types": types,
        "images": images,
        "pins": {p: w.pin(p) for p in ("vllm", "sglang")},
    }


def read_ray(w: Wheel) -> dict[str, Any]:
    """Ray Serve LLM: configuration fields, application builders, accelerator names, and `serve run`'s file."""
    serve, llm = "ray/serve/schema.py", "ray/llm/_internal/serve/"
    config = classes(w.tree(llm + "core/configs/llm_config.py"))
    schema = classes(w.tree(serve))
    public = w.tree("ray/serve/llm/__init__.py")
    http = classes(w.tree("ray/serve/schema.py"))["HTTPOptionsSchema"]
    return {
        "LLMConfig": config["LLMConfig"],
        "ModelLoadingConfig": config["ModelLoadingConfig"],
        "build_openai_app": classes(w.tree(llm + "core/ingress/builder.py"))["LLMServingArgs"],
        "build_pd_openai_app": classes(w.tree(llm + "serving_patterns/prefill_decode/builder.py"))["PDServingArgs"],
        "build_dp_openai_app": classes(w.tree(llm + "serving_patterns/data_parallel/builder.py"))["DPOpenAiServingArgs"],
        "builders": {n.name for n in public.body if isinstance(n, ast.FunctionDef)},
        "ServeDeploySchema": schema["ServeDeploySchema"],
        "ServeApplicationSchema": schema["ServeApplicationSchema"],
        "DeploymentSchema": schema["DeploymentSchema"],
        "HTTPOptionsSchema": http,
        "accelerators": {t for t in texts(w.tree("ray/util/accelerators/accelerators.py")) if re.fullmatch(r"[\w-]+", t)},
        "pins": {"vllm": w.pin("vllm")},
    }


def read_aiperf(w: Wheel) -> dict[str, Any]:
    """`aiperf profile`: option names, endpoint types, and the tags that its JSON export names metrics by."""
    flags = {
        t
        for c in calls(w.tree("aiperf/config/flags/cli_config.py"), "CLIParameter")
        for t in texts(keyword(c, "name") or ast.Tuple(elts=[], ctx=ast.Load()))
        if t.startswith("-")
    }
    tags = set()
    for name in w.under("aiperf/metrics/types/"):
        for node in ast.walk(w.tree(name)):
            if isinstance(node, ast.Assign) and [texts_of_name(t) for t in node.targets] == ["tag"]:
                tags |= set(texts(node.value))
    plugins = w.text("aiperf/plugin/plugins.yaml")
    block = re.search(r"^endpoint:\n((?:[ #].*\n|\n)*)", plugins, re.M)
    export = {t for t in texts(w.tree("aiperf/config/artifacts.py")) if t.endswith("aiperf.json")}
    return {
        "flags": flags,
        "metrics": tags,
        "endpoint_type": re.findall(r"^  (\w+):$", block[1] if block else "", re.M),
        "export": export,
    }


def read_guidellm(w: Wheel) -> dict[str, Any]:
    """`guidellm run`: its options, and for every kind of backend, data, profile and limit the fields that it takes."""
    arguments = classes(w.tree("guidellm/schemas/benchmark/entrypoints.py"))["BenchmarkArgs"]
    flags = {t for c in calls(w.tree("guidellm/cli/run.py"), "option") for a in c.args for t in texts(a) if t.startswith("-")}
    for node in arguments.values():
        extra = next((keyword(c, "json_schema_extra") for c in calls(node, "Field")), None)
        flags |= {kebab(t) for t in (texts(extra) if extra is not None else []) if t != "argument_alias"}
    trees = [w.tree(n) for n in w.names if n.startswith("guidellm/schemas/") and n.endswith(".py")]
    fields = {name: found for tree in trees for name, found in classes(tree).items()}
    kinds: dict[str, set[str]] = {}
    for node in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        kind = fields[node.name].get("kind")
        if kind is not None and ast.unparse(kind.annotation).startswith("Literal"):
            own = {*fields[node.name], *(f for b in node.bases for f in fields.get(texts_of_name(b), ()))}
            for name in texts(kind.annotation):
                kinds[name] = kinds.get(name, set()) | own
    return {"flags": flags, "kinds": {k: sorted(v) for k, v in sorted(kinds.items())}}


READERS: dict[str, Callable[[Wheel], dict[str, Any]]] = {
    "vllm": read_vllm,
    "sglang": read_sglang,
    "sglang-router": read_router("sglang_router"),
    "vllm-router": read_router("vllm_router"),
    "ai-dynamo": read_dynamo,
    "ray": read_ray,
    "aiperf": read_aiperf,
    "guidellm": read_guidellm,
}


def fetch(package: str, version: str | None, folder: Path) -> Path:
    """The wheel of a package, from `folder` where it lies there already, else by `pip download --no-deps`."""
    stem = package.replace("-", "_")
    found = sorted(folder.glob(f"{stem}-{version or '*'}-*.whl"))
    if not found:
        wanted = package if version is None else f"{package}=={version}"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), wanted],
            check=True,
        )
        found = sorted(folder.glob(f"{stem}-{version or '*'}-*.whl"))
    return max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name.split("-")[1])])


def write(package: str, wheel: Wheel, out: Path) -> dict[str, Any]:
    """Read one wheel and write its list; sets become sorted lists."""
    content = {
        k: v if isinstance(v, dict) and k in ("schema", "pins", "kinds") else sorted(v)
        for k, v in READERS[package](wheel).items()
    }
    head = {
        "package": wheel.package,
        "version": wheel.version,
        "released": wheel.released,
        "read_on": datetime.date.today().isoformat(),
        "read": sorted(wheel.read_files),
    }
    file = out / f"{package}-{wheel.version}.json"
    file.write_text(json.dumps(head | content, indent=1) + "\n", encoding="utf-8")
    return content


def main() -> None:
    """Rewrite the lists of all packages, those of the engine versions that Dynamo and Ray pin included."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="keep or find the wheels here")
    parser.add_argument("--out", type=Path, default=DATA)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.wheels or Path(temporary)
        wanted: list[tuple[str, str | None]] = [(p, None) for p in READERS]
        for package, version in wanted:
            wheel = Wheel(fetch(package, version, folder))
            content = write(package, wheel, given.out)
            pins = content.get("pins", {})
            wanted += [(p, v) for p, v in pins.items() if v is not None and (p, v) not in wanted]
            print(f"{package} {wheel.version} ({wheel.released}): {', '.join(f'{k} {len(v)}' for k, v in content.items())}")


if __name__ == "__main__":
    main()
