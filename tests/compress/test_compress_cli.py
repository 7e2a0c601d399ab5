"""`tandem compress RECIPE --plan`: one JSON object, a table for people, and one line where it cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from tandem.cli.app import main
from tandem.compress.recipe_files import recipe_names

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `tandem compress` with these words: exit code, what it printed, what it complained of."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tandem", "compress", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_the_plan_is_one_json_object_with_candidates_best_first(run: Run) -> None:
    code, out, err = run("12b-to-9b", "--plan", "--json")
    plan = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [(c["hidden_size"], c["ffn_size"], c["mamba_heads"]) for c in plan["candidates"]] == [
        (4480, 17920, 112), (4800, 14400, 120), (4480, 15680, 128),
    ]  # fmt: skip
    best = plan["candidates"][0]
    assert (best["layers"], best["attention_layers"], len(best["kept_layers"])) == (56, 4, 56)
    assert best["parameters"] == 8_923_356_912
    assert best["total_bytes"] <= plan["limits"]["total_bytes"] == 21_109_763_768
    assert best["tokens_per_s"] == best["prediction"]["tokens_per_s"]["value"]
    assert best["prediction"]["deployment"]["hardware"] == "a10g"
    assert best["prediction"]["deployment"]["model"] == "nvidia/NVIDIA-Nemotron-Nano-12B-v2-56L-h4480-f17920-m112"
    assert plan["teacher"]["tokens_per_s"] is None
    assert "a10g offers" in plan["teacher"]["refused"]
    rates = [c["tokens_per_s"] for c in plan["candidates"]]
    assert rates == sorted(rates, reverse=True)


def test_the_same_command_prints_the_same_bytes(run: Run) -> None:
    assert run("nano-compress", "--plan", "--json") == run("nano-compress", "--plan", "--json")


def test_deployments_are_predicted_on_the_hardware_that_is_named(run: Run) -> None:
    """All objectives of the recipe are moved, and it is said of the run too."""
    words = ("12b-to-9b", "--plan", "--json", "--hardware", "l4", "objective.fixed_batch.batch=2")
    for more, kind in (((), "fixed-batch"), (("--objective", "cluster"), "cluster")):
        code, out, err = run(*words, *more)
        assert (code, err) == (0, "")
        plan = json.loads(out)
        assert (plan["objective"]["kind"], plan["objective"]["hardware"]) == (kind, "l4")
        assert plan["candidates"][0]["prediction"]["deployment"]["hardware"] == "l4"
    assert run("nano-compress", "--plan", "--hardware", "host")[2].startswith(
        "error: hardware='host': this machine was not measured"
    )


def test_changes_and_the_objective_are_options(run: Run) -> None:
    words = ("12b-to-9b", "select.take=1", "select.predict=taken", "objective.cluster.gpus=2", "--objective", "cluster")
    _, out, _ = run(*words, "--plan", "--json")
    plan = json.loads(out)
    assert plan["objective"]["kind"] == "cluster"
    assert len(plan["candidates"]) == 1
    assert plan["candidates"][0]["prediction"]["gpus"] <= 2


def test_people_see_a_table_and_what_it_rests_on(run: Run) -> None:
    code, out, _ = run("12b-to-9b", "--plan")
    shown = " ".join(out.split())
    assert code == 0
    for words in (
        "17,920", "8.923 B", "159.8", "9 of 27 shapes fit (19.66 GiB in all).", "evidence transferred",
        "The teacher cannot be served so", "Nothing was distilled", "It can be planned, not run",
    ):  # fmt: skip
        assert words in shown
    assert "experts" not in shown  # sizes that the model does not have are left out


def test_without_a_recipe_all_are_listed(run: Run) -> None:
    _, out, _ = run("--json")
    assert tuple(item["name"] for item in json.loads(out)["items"]) == recipe_names()
    _, shown, _ = run()
    assert [line.split()[0] for line in shown.splitlines()] == list(recipe_names())


def test_a_plan_needs_no_torch() -> None:
    code = """
import sys
from tandem.cli.app import main
sys.argv = ["tandem", "compress", "nano-compress", "--plan", "--json"]
try:
    main()
except SystemExit as end:
    print(end.code, *sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    code_and_modules = done.stderr.split()
    assert code_and_modules[0] == "0"
    assert not {name.partition(".")[0] for name in code_and_modules} & {"torch", "ray", "transformers", "scipy"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nosuch", "--plan"), "recipe='nosuch': no such recipe"),
        (("nano-compress", "--plan", "budget.share=0.1"), "budget.share=0.1: allows 832,458; the least of 72 shapes is"),
        (("nano-compress", "--plan", "budget.share=1.0"), "budget: nano-align-hybrid is within it already"),
        (("nano-compress", "--plan", "width.neurons=[1]"), "width.neurons: no such field"),
        (("nano-compress", "--plan", "--objective", "cluster"), "objective.kind='cluster': objective.cluster must be stated"),
        (("nano-compress", "--plan", "--objective", "luck"), "objective.kind='luck': must be one of fixed-batch, cluster"),
        (("nano-compress", "--plan", "--memory", "nan"), "memory=nan: must be a number above 0"),
        (("nano-compress", "--plan", "--memory", "-1"), "memory=-1.0: must be a number above 0"),
        (("nano-compress", "--plan", "data.post.tools=-1"), "data.post.tools=-1: must be"),
        (("nano-compress", "--plan", "stages.distil-1.distil.micro=3"), "stages.distil-1.distil.micro=3: must divide rows=4"),
        (("nano-compress", "--plan", "stages.distil-1.distil.linears=int3"), "stages.distil-1.distil.linears='int3'"),
        (("12b-to-9b",), "recipe='12b-to-9b': it takes a cluster, the 12B's weights"),
    ],
)
def test_what_cannot_be_is_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {said}")
