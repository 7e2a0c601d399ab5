"""The package as a whole: what it imports, what it exports, how it is written, and the data that ships with it."""

from __future__ import annotations

import csv
import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tandem
from tandem.sim.traces import BUNDLED
from tandem.spec.workload import BUNDLED_TRACES, read_trace

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tandem"
FILES = sorted(PACKAGE.rglob("*.py"))
TRACES = PACKAGE / "spec" / "data" / "traces"
HEAVY = ("torch", "ray", "transformers", "scipy", "pyarrow", "aiconfigurator_core")
TRAFFIC = ["--isl", "2048", "--osl", "256", "--ttft", "2"]
PLAN = ["plan", "-m", "nano-9b-v2", "--hardware", "h100-sxm", "--gpus", "4", *TRAFFIC, "--json"]
LONGEST = 400


def modules(package: str) -> list[str]:
    found = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    return [name for name in found if name.startswith(f"tandem.{package}.") and not name.endswith(("__init__", "__main__"))]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


@pytest.mark.parametrize("package", ["spec", "perf", "plan", "sched", "report", "cli"])
def test_importing_every_module_of_a_package_imports_nothing_heavy(package: str) -> None:
    names = modules(package)
    assert len(names) >= 2
    done = run(f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(HEAVY)


def test_planning_from_the_command_line_imports_nothing_heavy() -> None:
    code = f"""
import sys
from tandem.cli.app import main
sys.argv = ["tandem", *{PLAN!r}]
try:
    main()
except SystemExit as end:
    print(end.code, *sys.modules, file=sys.stderr)
"""
    done = run(code)
    code_and_modules = done.stderr.split()
    assert code_and_modules[0] == "0"
    assert not {name.partition(".")[0] for name in code_and_modules} & set(HEAVY)


def test_importing_tandem_imports_not_even_numpy() -> None:
    done = run("import sys, tandem\nprint(*sys.modules)")
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {*HEAVY, "numpy", "typer", "rich", "plotly"}


# --- the public names ---


def test_all_is_exactly_what_the_reference_documents() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    documented = re.findall(r"^### `?(?:tandem\.)?(\w+)`?", text, flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert sorted(documented) == sorted(tandem.__all__)


@pytest.mark.parametrize("name", tandem.__all__)
def test_every_public_name_can_be_had_and_is_no_module(name: str) -> None:
    found = getattr(tandem, name)
    assert found is not None
    assert type(found).__name__ != "module"
    assert name in dir(tandem)
    assert name == "__version__" or found.__doc__


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'simulat'; it has .*find_plan"):
        _ = tandem.simulat


def test_no_public_name_is_shadowed_by_a_package() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not packages & set(tandem.__all__)


def test_the_version_is_the_one_of_the_distribution() -> None:
    from importlib.metadata import version

    assert tandem.__version__ == version("tandem-lm")


# --- how it is written ---

BANNED = re.compile(r"context_latency|\w*tp_size|input_len|\w+_ms\b|\bgen_\w*")
OF_PERF = ("silicon", "op_tables", "measurements", "peer", "peer_worker")
FOREIGN = {"model/hf_files.py", "serve/tracing.py", *(f"perf/{name}.py" for name in OF_PERF)}
"""Files that name the columns of other people's tables, the arguments of their functions, or OpenTelemetry's attributes."""
FOR_PEOPLE = ("report/", "cli/")


def banned_words(relative: str, text: str) -> list[str]:
    found = BANNED.findall(text)
    if relative in FOREIGN:
        return [word for word in found if not word.endswith(("tp_size", "_ms", "gen_ai"))]
    if relative.startswith(FOR_PEOPLE):
        return [word for word in found if not word.endswith("_ms")]
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_the_names_are_those_of_the_vocabulary(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    assert banned_words(relative, path.read_text(encoding="utf-8")) == []


def test_the_search_for_banned_words_finds_them() -> None:
    assert banned_words("plan/x.py", "a.ttft_ms = gen_tokens(tp_size)") == ["ttft_ms", "gen_tokens", "tp_size"]
    assert banned_words("perf/silicon.py", "row['silicon_ttft_ms'], gen_tp") == ["gen_tp"]
    assert banned_words("report/text.py", "span_ms(input_len)") == ["input_len"]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_no_file_is_longer_than_one_can_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("package", ["spec", "perf", "model", "plan"])
def test_only_reports_and_commands_print(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        assert not re.search(r"^\s*print\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE), path


def test_every_module_opens_with_what_it_is_for() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not text or text.startswith('"""'), path


# --- the data that ships with it ---


def test_the_bundled_trace_holds_the_rows_of_its_file() -> None:
    with gzip.open(TRACES / BUNDLED_TRACES["azure-conversation-2023"], "rt", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    trace = read_trace("azure-conversation-2023")
    assert len(trace.isl) == len(rows) == 19_366
    assert trace.isl.tolist() == [int(row["isl"]) for row in rows]
    assert trace.osl.tolist() == [int(row["osl"]) for row in rows]
    assert float(trace.isl.mean()) == pytest.approx(1154.6974078281523, rel=1e-12)
    assert float(trace.osl.mean()) == pytest.approx(211.12594237323142, rel=1e-12)
    assert (trace.arrival_s[0], trace.arrival_s[-1]) == (0.0, 3501.721937)


@pytest.mark.parametrize("name", sorted(BUNDLED_TRACES))
def test_summarising_a_bundled_trace_keeps_its_token_totals_and_rate(name: str) -> None:
    trace = read_trace(name)
    workload = trace.workload()
    assert workload.mean_isl == pytest.approx(float(trace.isl.mean()))
    assert workload.mean_osl == pytest.approx(float(trace.osl.mean()))
    assert len(workload.isl) <= 64
    span = float(trace.arrival_s[-1] - trace.arrival_s[0])
    assert workload.requests_per_s == pytest.approx((len(trace.isl) - 1) / span)


def test_every_bundled_trace_has_its_licence_named() -> None:
    text = (TRACES / "LICENSES.txt").read_text(encoding="utf-8")
    shipped = {path.name for path in TRACES.iterdir() if path.suffix == ".gz"}
    assert shipped == {file for _, files in BUNDLED.values() for file in files}
    assert set(BUNDLED_TRACES) < set(BUNDLED)
    for name in shipped:
        entry = text.partition(name)[2].partition("\n\n")[0]
        for field in ("Origin:", "Licence:", "Attribution:", "Change:"):
            assert field in entry, (name, field)


def test_the_licence_and_the_notice_ship() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (ROOT / "NOTICE").read_text(encoding="utf-8").strip()
