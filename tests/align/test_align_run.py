"""A whole alignment of a tiny model: stages, what they leave, going on with a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_model

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
import tandem
from tandem.align.encode import encode_answer
from tandem.align.recipe import AlignRecipe
from tandem.align.run import Aligned, run_recipe
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.recipes import build
from tandem.train.data.bpe import save_tokenizer, train_bpe

pytestmark = pytest.mark.slow
TOKENIZER = train_bpe(["ab=12, cd=34. ab?"], 320)
TRAIN = {"steps": 2, "rows": 4, "lr": 1e-3, "checkpoint_every": 1}
PAIRS = {"asks": {"reasoning": 6}, "samples": 3, "max_tokens": 64}
STAGES: dict[str, Any] = {
    "sft-1": {"sft": {"data": {"reasoning": 30, "instructions": 4, "tools": 4}, "train": {**TRAIN, "length": 900}}},
    "grpo": {"grpo": {"asks": {"reasoning": 4}, "train": {"steps": 1, "rows": 4, "generations": 2, "max_tokens": 64}}},
    "dpo": {"dpo": {"rounds": 2, "pairs": PAIRS, "train": TRAIN}},
    "judge": {"reward_model": {"pairs": PAIRS, "train": TRAIN}},
    "rlhf": {
        "after": "grpo",
        "grpo": {
            "reward_model": "judge",
            "asks": {"reasoning": 4, "no_think": 0.5},
            "train": {"steps": 1, "rows": 4, "generations": 2, "max_tokens": 64},
        },
    },
    "merge": {"merge": {"first": "dpo", "second": "rlhf", "asks": {"reasoning": 4}, "alphas": [0.25, 0.5], "max_tokens": 64}},
}


@dataclass(frozen=True)
class Sampled:
    completion_ids: tuple[int, ...]
    text: str
    finished: bool = True
    error: str | None = None

    @property
    def logprobs(self) -> tuple[float, ...]:
        return (-1.0,) * len(self.completion_ids)

    @property
    def chosen(self) -> tuple[bool, ...]:
        return (True,) * len(self.completion_ids)


class Solver:
    """Answers questions of `recall`, rightly where seed and weights say so: other weights answer otherwise."""

    made = 0

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[Sequence[int]],
        thinking: Sequence[bool],
        thinking_budgets: Sequence[int | None],
        temperature: float,
        max_tokens: int,
    ) -> list[list[Sampled]]:
        Solver.made += 1
        sign = int(self.decoder.lm_head.weight.detach().double().sum().item() * 1e9)
        return [
            [self.answer(prompt, think, (seed + sign) % 2 == 0) for seed in some]
            for prompt, think, some in zip(prompts, thinking, seeds, strict=True)
        ]

    def answer(self, prompt: Sequence[int], thinking: bool, right: bool) -> Sampled:
        text = self.tokenizer.decode(prompt)
        pairs = dict(re.findall(r"(\w\w)=(\d\d)", text))
        key = next(word for word in reversed(re.findall(r"(\w\w)\?", text)) if word in pairs)
        value = pairs[key] if right else "x"
        answer = f"{key}={value}\n</think>\n\n{value}" if thinking else value
        return Sampled(tuple(encode_answer(answer, self.tokenizer)), answer)


class Assessor:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, folder: Path, last: bool) -> dict[str, Any]:
        self.asked.append((folder.parent.name, last))
        return {"reasoning": {"thinking on": {"all": {"accuracy": 0.5, "low": 0.4, "high": 0.6}}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tandem.save_model(small_model("hybrid", vocabulary=TOKENIZER.backend.get_vocab_size(), seed=0), folder)
    save_tokenizer(TOKENIZER, folder)
    return folder


def recipe_of(base: Path, **changes: Any) -> AlignRecipe:
    return build(AlignRecipe, {"name": "tiny", "base": str(base), "tasks": ["recall"], "stages": STAGES, **changes})


def run(base: Path, out: Path, **changes: Any) -> tuple[Aligned, Assessor, list[dict[str, Any]]]:
    assess, heard = Assessor(), list[dict[str, Any]]()
    recipe = recipe_of(base, **changes)
    made = run_recipe(recipe, out, make_generator=Solver, assess=assess, date="2026-11-29", listen=heard.append)
    return made, assess, heard


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Aligned, Assessor, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, *run(base, out)


def test_every_stage_leaves_its_report_and_its_model(
    base: Path, whole: tuple[Path, Aligned, Assessor, list[dict[str, Any]]]
) -> None:
    out, made, assess, heard = whole
    reports = {name: json.loads((out / name / "report.json").read_text()) for name in STAGES}
    assert [reports[name]["after"] for name in STAGES] == ["base", "sft-1", "grpo", "dpo", "grpo", "dpo"]
    assert assess.asked == [
        (base.parent.name, False), ("sft-1", False), ("grpo", False), ("dpo", False), ("rlhf", False), ("merge", False),
        (out.name, True),
    ]  # fmt: skip
    assert [event["stage"] for event in heard if event["kind"] == "report"] == ["base", *STAGES, "final"]
    assert {event["stage"] for event in heard if event["kind"] == "step"} >= {
        "sft-1",
        "grpo",
        "dpo 1",
        "dpo 2",
        "judge",
        "rlhf",
    }
    assert {event["stage"] for event in heard if event["kind"] == "sampled"} == {"dpo", "judge", "merge"}
    assert len(reports["dpo"]["metrics"]["rounds"]) == 2
    assert reports["dpo"]["metrics"]["rounds"][0]["pairs"] > 0
    assert [row["alpha"] for row in reports["merge"]["metrics"]["sweep"]] == [0.25, 0.5]
    assert not (out / "judge" / "model").exists()
    assert tandem.load_model(out / "sft-1" / "model", dtype="auto").backbone.embeddings.weight.dtype is torch.float32
    assert list(made.metrics["reports"]) == ["base", *STAGES, "final"]
    assert made.metrics["seconds"] == sum(report["seconds"] for report in made.metrics["reports"].values()) > 0


def test_the_last_model_is_a_chat_model_with_its_card(whole: tuple[Path, Aligned, Assessor, list[dict[str, Any]]]) -> None:
    out, made, _, _ = whole
    assert made.checkpoint == out / "model"
    model, tokenizer = tandem.load_model(made.checkpoint, dtype="auto"), load_tokenizer(made.checkpoint)
    assert model.backbone.embeddings.weight.dtype is torch.bfloat16
    assert model.token_ids.eos == (tokenizer.backend.token_to_id("<SPECIAL_12>"),)
    assert tokenizer.chat([{"role": "user", "content": "ab=12. ab?"}]).endswith("<SPECIAL_11>Assistant\n<think>\n")
    card = (made.checkpoint / "README.md").read_text()
    assert card.startswith("---\n")
    assert "tandem align tiny" in card
    assert "| merge | merge of two checkpoints | dpo, rlhf |" in card
    assert "| rlhf | 50.0% (40.0% to 60.0%) |" in card
    merged = made.metrics["reports"]["merge"]["metrics"]["alpha"]
    first, second = (tandem.load_model(out / name / "model").state_dict() for name in ("dpo", "rlhf"))
    for name, tensor in tandem.load_model(out / "merge" / "model").state_dict().items():
        torch.testing.assert_close(tensor, (1 - merged) * first[name] + merged * second[name])


def test_finished_stages_are_not_run_again(base: Path, whole: tuple[Path, Aligned, Assessor, list[dict[str, Any]]]) -> None:
    out, made, _, _ = whole
    again, assess, heard = run(base, out)
    assert again.to_json() == made.to_json()
    assert assess.asked == heard == []
    with pytest.raises(SpecError, match=r"holds a run of another recipe \(seed differs\)"):
        run(base, out, seed=1)


class Stopped(Exception):
    pass


def test_a_stage_that_was_stopped_goes_on_with_the_answers_it_had(
    base: Path, whole: tuple[Path, Aligned, Assessor, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Stopped in the second round of DPO, whose answers came from the weights that the first round left."""

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["stage"] == "dpo 2":
            raise Stopped

    out = tmp_path / "out"
    recipe = recipe_of(base)
    with pytest.raises(Stopped):
        run_recipe(recipe, out, make_generator=Solver, assess=Assessor(), date="", listen=stop)
    assert not (out / "dpo" / "report.json").exists()
    rounds = [json.loads((out / "dpo" / f"round-{i}" / "pairs.json").read_text())["pairs"] for i in (1, 2)]
    Solver.made = 0
    only = {name: STAGES[name] for name in ("sft-1", "grpo", "dpo")}
    made = json.loads((out / "recipe.json").read_text())
    made["stages"] = {name: made["stages"][name] for name in only}
    (out / "recipe.json").write_text(json.dumps(made))
    run(base, out, stages=only)
    assert Solver.made == 0
    assert [json.loads((out / "dpo" / f"round-{i}" / "pairs.json").read_text())["pairs"] for i in (1, 2)] == rounds
    ours, theirs = (tandem.load_model(folder / "dpo" / "model").state_dict() for folder in (out, whole[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_cannot_be_learned_from_stops_the_run_with_a_line(base: Path, tmp_path: Path) -> None:
    stages = {"dpo": {"dpo": {"pairs": {**PAIRS, "samples": 2}, "train": TRAIN}}}

    class Right(Solver):
        def answer(self, prompt: Sequence[int], thinking: bool, right: bool) -> Sampled:
            return super().answer(prompt, thinking, True)

    with pytest.raises(SpecError, match=r"stages\.dpo: no question has both .* \(6 all right and 0 all wrong\); ask"):
        run_recipe(recipe_of(base, stages=stages), tmp_path, make_generator=Right, assess=Assessor(), date="")
    with pytest.raises(SpecError, match="stages: none of them leaves a model"):
        recipe_of(base, stages={"judge": STAGES["judge"]})
    with pytest.raises(SpecError, match="recipe='tiny': too large"):
        run(base, tmp_path / "never", plan_only="too large")
    with pytest.raises(SpecError, match="nothing-here"):
        run(Path("nothing-here"), tmp_path / "never")
    assert not (tmp_path / "never").exists()
