"""The reader of wheels: which option strings it finds in source that it neither installs nor imports."""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "read_serving_flags.py"
ROUTER = """
import no_such_package

def add(parser, prefix):
    parser.add_argument(f"--{prefix}policy", choices=["random", "round_robin"])
    parser.add_argument("--old", action=DeprecatedStoreTrueAction)
    parser.add_argument("--host", "-h", default="--not-an-option-but-a-default")
    group.add_argument("--cache", action=argparse.BooleanOptionalAction)
    add_negatable_bool_argument(group, flag_name="--push", env_var="PUSH", help="--pull")
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_serving_flags", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_options_are_found_in_source_that_cannot_be_imported(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "vllm_router-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "vllm_router-1.2.3.dist-info/METADATA", "Name: vllm-router\nVersion: 1.2.3\nRequires-Dist: vllm[x]==4.5; a\n\ntext"
        )
        archive.writestr("vllm_router/router_args.py", ROUTER)
    wheel = tool.Wheel(path)
    content = tool.write("vllm-router", wheel, tmp_path)
    assert content["flags"] == sorted(["--policy", "--host", "-h", "--cache", "--no-cache", "--push", "--no-push"])
    assert content["policy"] == ["random", "round_robin"]
    assert (wheel.package, wheel.version, wheel.pin("vllm"), wheel.pin("sglang")) == ("vllm-router", "1.2.3", "4.5", None)
    assert (tmp_path / "vllm-router-1.2.3.json").exists()


@pytest.mark.parametrize(
    ("field", "flags"),
    [
        ('tp_size: A[int, Arg(help="x", aliases=["--tensor-parallel-size"])] = 1', {"--tp-size", "--tensor-parallel-size"}),
        ('nnodes: A[int, "The number."] = 1', {"--nnodes"}),
        ('hidden: A[bool, Arg(help="x", no_cli=True)] = False', set()),
        ('log: A[bool, Arg(help="x", action=argparse.BooleanOptionalAction)] = False', {"--log", "--no-log"}),
        ('renamed: A[str, Arg(help="x", cli_name="--other")] = ""', {"--other"}),
        ("derived = Derived(fn='x')", set()),
        ("plain: int = 1", set()),
    ],
)
def test_sglangs_annotated_fields_become_options(tool: ModuleType, field: str, flags: set[str]) -> None:
    node = ast.parse(field).body[0]
    assert (tool._sglang_field(node.target.id, node.annotation) if isinstance(node, ast.AnnAssign) else set()) == flags  # type: ignore[union-attr]


def test_a_list_that_went_elsewhere_is_an_error_and_not_an_empty_list(tool: ModuleType) -> None:
    assert tool.literal(ast.parse('K = Literal["a", "b"]'), "K") == ["a", "b"]
    with pytest.raises(LookupError, match="not in this release"):
        tool.literal(ast.parse("L = 1"), "K")
