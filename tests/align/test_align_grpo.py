from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from grpo_cases import ASKS, CLOSING, FIRST, QUICK, TOKENIZER, Interrupted, Table, decoder_of, render, run

from tandem.align import grpo
from tandem.align.grpo import GrpoSettings, Reward
from tandem.align.grpo_trainer import RolloutTrainer
from tandem.align.rollout import Rollout
from tandem.align.sample import Ask
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.train.loop import Diverged


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The first batch of a run as TRL hands it to its loss, and the loss, its gradients and the trainer."""

    def catch(decoder: Decoder, out: Path, settings: GrpoSettings, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def step(trainer: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            model.train()
            batch = trainer._prepare_inputs(inputs)
            if "change" in options:
                options["change"](model, batch)
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            found.update(trainer=trainer, batch=batch, loss=loss.item())
            raise Interrupted

        monkeypatch.setattr(RolloutTrainer, "training_step", step)
        with pytest.raises(Interrupted):
            run(decoder, out, settings, **{name: value for name, value in options.items() if name != "change"})
        found["gradients"] = {name: None if p.grad is None else p.grad.clone() for name, p in decoder.named_parameters()}
        return found

    return catch


def log_probabilities(decoder: Decoder, batch: dict[str, Any], temperature: float) -> torch.Tensor:
    """Of the completions, row by row without padding."""
    rows = []
    for i, ids in enumerate(batch["completion_ids"]):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        logits = decoder(torch.cat([prompt, ids])[None])[0, len(prompt) - 1 : -1] / temperature
        rows.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize(("beta", "normalise"), [(0.0, True), (0.3, True), (0.3, False)])
def test_the_loss_is_the_formula(caught: Callable[..., dict[str, Any]], tmp_path: Path, beta: float, normalise: bool) -> None:
    """Through TRL's own code, with a policy that has moved away from the one that sampled and from the reference."""
    decoder, temperature = decoder_of(), 0.8
    start = copy.deepcopy(decoder)

    def change(model: Any, batch: dict[str, Any]) -> None:
        old = log_probabilities(decoder, batch, temperature).detach()
        batch["old_per_token_logps"] = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))

    settings = replace(QUICK, beta=beta, normalise=normalise, temperature=temperature)
    found = caught(decoder, tmp_path, settings, rewards=[FIRST], generator=Table(decoder), change=change)
    batch = found["batch"]
    decoder.zero_grad()
    logps, reference = log_probabilities(decoder, batch, temperature), log_probabilities(start, batch, temperature).detach()
    ratio = (logps - batch["old_per_token_logps"]).exp()
    assert bool((ratio > 1.28).any()) and bool((ratio < 0.8).any())  # noqa: PT018
    rewards = batch["completion_ids"][:, 0] / 100
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(batch["prompt_ids"].tolist()):
        by_prompt.setdefault(tuple(prompt), []).append(i)
    advantages = torch.zeros(8)
    for rows in by_prompt.values():
        group = rewards[rows]
        for i in rows:
            others = torch.stack([rewards[j] for j in rows if j != i]).mean()
            advantages[i] = (rewards[i] - others) / (group.std() + 1e-4 if normalise else 1.0)
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
    apart = reference - logps
    chosen = torch.zeros_like(batch["completion_mask"])
    for i, length in enumerate(batch["completion_mask"].sum(1).tolist()):
        chosen[i, :length], chosen[i, length - 2] = 1, 0
    loss = ((-gain + beta * (apart.exp() - apart - 1)) * chosen).sum() / chosen.sum()
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None
        assert torch.allclose(found["gradients"][name], p.grad, atol=1e-5, rtol=1e-3), name


def test_small_passes_without_padding_learn_the_same(caught: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    gradients, compute = [], RolloutTrainer.compute_loss
    settings = replace(QUICK, rows=16, steps=1, beta=0.2)
    for micro in (None, 2):
        decoder, seen = decoder_of(), []
        before = [p.detach().clone() for p in decoder.parameters()]

        def watched(trainer: Any, model: Any, batch: Any, *args: Any, seen: list[int] = seen, **kwargs: Any) -> Any:
            seen.append(int(batch["completion_mask"].sum()) + int(batch["prompt_mask"].sum()))
            return compute(trainer, model, batch, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RolloutTrainer, "compute_loss", watched)
            small = replace(settings, micro=micro)
            heard: list[dict[str, Any]] = []
            run(decoder, tmp_path / str(micro), small, rewards=[FIRST], generator=Table(decoder), listen=heard.append)
        assert seen == sorted(seen)
        assert len(seen) == (1 if micro is None else 8)
        moved = torch.cat([(p - b).flatten() for p, b in zip(decoder.parameters(), before, strict=True)])
        gradients.append((moved, heard[0]["grad_norm"], heard[0]["kl"], heard[0]["loss"]))
    assert gradients[0][1:] == pytest.approx(gradients[1][1:], abs=1e-5)
    assert torch.allclose(gradients[0][0], gradients[1][0], atol=1e-4)


def test_forced_tokens_are_not_learned_from(caught: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """What reward or numbers a forced token has does not matter, though the tokens after it were sampled behind it."""
    decoder = decoder_of(eos=())
    settings = replace(QUICK, thinking_budget=2, max_tokens=40)
    with torch.no_grad():
        decoder.lm_head.weight[TOKENIZER.encode("\n")[0]] *= 3
    found = caught(decoder, tmp_path / "whole", settings, rewards=[FIRST])
    batch, mask = found["batch"], found["batch"]["tool_mask"]
    forced = (mask == 0) & batch["completion_mask"].bool()
    assert bool(forced.any())
    assert set(batch["completion_ids"][forced].tolist()) == {CLOSING}
    decoder.zero_grad()
    logps = log_probabilities(decoder, batch, 1.0)
    counted = batch["completion_mask"] * mask
    ratio = (logps - logps.detach()).exp()
    (-(ratio * batch["advantages"][:, None] * counted).sum() / counted.sum()).backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None
        assert torch.allclose(found["gradients"][name], p.grad, atol=1e-5, rtol=1e-3), name


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    decoder, heard = decoder_of(), []
    table = Table(decoder)
    metrics = run(decoder, tmp_path, replace(QUICK, steps=3), rewards=[FIRST], generator=table, listen=heard.append, stage="if")
    assert [(event["kind"], event["stage"], event["step"], event["steps"]) for event in heard] == [
        ("step", "if", i + 1, 3) for i in range(3)
    ]
    for event in heard:
        assert {
            "loss", "grad_norm", "lr", "reward", "reward_std", "kl", "entropy", "clip_share", "finished", "length",
            "forced_share", "flat_groups", "logprob_gap", "rollout_s", "rollout_tokens_per_s", "rollout_share", "tokens_per_s",
        } <= event.keys()  # fmt: skip
        assert 0 < event["rollout_share"] < 1
        assert event["forced_share"] == pytest.approx(1 / event["length"])
        assert 3 <= event["length"] <= 6
    assert metrics["steps"] == 3
    assert metrics["reward"] == heard[-1]["reward"]
    json.dumps(metrics)
    call = table.calls[0]
    assert len(call["prompts"]) == 2
    assert call["temperature"] == 1.0
    assert call["max_tokens"] == 6
    seeds = [seed for call in table.calls for group in call["seeds"] for seed in group]
    assert len(set(seeds)) == 24
    asked = {tuple(render(ask)): ask for ask in ASKS}
    assert [asked[p].thinking for p in call["prompts"]] == call["thinking"]


def test_a_run_at_its_end_says_the_same_again(tmp_path: Path) -> None:
    first = run(decoder_of(), tmp_path)
    again = run(decoder_of(), tmp_path)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert {"reward", "kl", "length"} <= again.keys()
    assert [list(point) for point in again["course"]] == [
        ["step", "loss", "reward", "kl", "finished", "length", "flat_groups"] for _ in range(2)
    ]


def test_a_run_is_where_its_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU too: the model of these tests is on the CPU."""
    asked: dict[str, Any] = {}

    def arguments(*args: Any, **given: Any) -> None:
        asked.update(given)
        raise Interrupted

    monkeypatch.setattr(grpo, "arguments", arguments)
    with pytest.raises(Interrupted):
        run(decoder_of(), tmp_path)
    assert asked["use_cpu"] is True


def test_passes_may_be_others_when_a_run_goes_on(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=2, checkpoint_every=1)
    whole, stopped, resumed = decoder_of(), decoder_of(), decoder_of()
    run(whole, tmp_path / "whole", settings, generator=Table(whole), rewards=[FIRST])

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(stopped, tmp_path / "stopped", settings, generator=Table(stopped), rewards=[FIRST], listen=stop)
    other = replace(settings, micro=2, checkpoint_every=7)
    run(resumed, tmp_path / "stopped", other, generator=Table(resumed), rewards=[FIRST])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_budget_is_for_asks_that_think(tmp_path: Path) -> None:
    decoder = decoder_of()
    table = Table(decoder)
    run(decoder, tmp_path, replace(QUICK, thinking_budget=3, steps=3), rewards=[FIRST], generator=table)
    pairs = {pair for call in table.calls for pair in zip(call["thinking"], call["thinking_budgets"], strict=True)}
    assert pairs == {(True, 3), (False, None)}


def test_equal_rewards_teach_nothing_and_are_counted(tmp_path: Path) -> None:
    decoder, heard = decoder_of(), []
    before = copy.deepcopy(decoder.state_dict())
    same = Reward(name="same", score=lambda asks, answers: [0.9] * len(answers))
    odd = replace(QUICK, rows=6, generations=3, weight_decay=0.0)
    assert torch.full((3,), 0.9).mean() != torch.tensor(0.9)  # which must not pass for a difference
    run(decoder, tmp_path, odd, rewards=[same], listen=heard.append)
    assert [event["flat_groups"] for event in heard] == [2, 2]
    assert [event["grad_norm"] for event in heard] == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize(("micro", "passes"), [(4, 2), (1, 8)])
def test_no_pass_is_spent_on_answers_that_teach_nothing(
    caught: Callable[..., dict[str, Any]], tmp_path: Path, micro: int, passes: int
) -> None:
    """The gradient is the formula's all the same, with the tokens of all answers in its mean."""
    rows, compute = [], RolloutTrainer.compute_loss

    def watched(trainer: Any, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(batch["completion_ids"]))
        return compute(trainer, model, batch, *args, **kwargs)

    def half(asks: Sequence[Ask], answers: Sequence[Rollout]) -> list[float]:
        return [0.0] * 4 + [answer.completion_ids[0] / 100 for answer in answers[4:]]

    rewards = [Reward(name="half", score=half)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutTrainer, "compute_loss", watched)
        small, heard = decoder_of(), []
        settings = replace(QUICK, micro=micro, steps=1)
        run(small, tmp_path / "small", settings, rewards=rewards, generator=Table(small), listen=heard.append)
    assert rows == [max(1, 4 // passes)] * passes  # a pass has an answer at least
    assert heard[0]["flat_groups"] == 1
    decoder = decoder_of()
    whole = caught(decoder, tmp_path / "whole", QUICK, rewards=rewards, generator=Table(decoder))
    batch = whole["batch"]
    assert len(batch["advantages"]) == 4
    assert bool((batch["advantages"] != 0).all())
    decoder.zero_grad()
    logps = log_probabilities(decoder, batch, 1.0)
    counted = batch["completion_mask"] * batch["tool_mask"]
    ratio = (logps - logps.detach()).exp()
    loss = -(ratio * batch["advantages"][:, None] * counted).sum() / batch["num_items_in_batch"]
    assert batch["num_items_in_batch"] > counted.sum()
    loss.backward()
    norm = 0.0
    for name, p in decoder.named_parameters():
        assert p.grad is not None
        assert torch.allclose(whole["gradients"][name], p.grad, atol=1e-5, rtol=1e-3), name
        norm += float(p.grad.square().sum())
    assert heard[0]["grad_norm"] == pytest.approx(norm**0.5, rel=1e-3)


def test_rewards_are_added_by_weight(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    decoder = decoder_of()
    one = Reward(name="one", score=lambda asks, answers: [float(i) for i in range(len(answers))], weight=2.0)
    two = Reward(name="two", score=lambda asks, answers: [10.0 if ask.thinking else 20.0 for ask in asks], weight=0.5)
    run(decoder, tmp_path, replace(QUICK, steps=1), rewards=[one, two], generator=Table(decoder), listen=heard.append)
    (event,) = heard
    assert any(event["reward"] == pytest.approx(2 * 3.5 + mean) for mean in (5, 7.5, 10))


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    courses, weights = [], []
    for i, seed in enumerate((0, 0, 1)):
        decoder = decoder_of()
        courses.append(run(decoder, tmp_path / str(i), seed=seed)["course"])
        weights.append(decoder.lm_head.weight.detach().clone())
    assert courses[0] == courses[1] != courses[2]
    assert torch.equal(weights[0], weights[1])


def test_the_reference_stays_as_the_model_was(caught: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    decoder = decoder_of()
    found = caught(decoder, tmp_path, replace(QUICK, beta=0.1), generator=Table(decoder))
    reference = found["trainer"].ref_model
    assert not any(p.requires_grad for p in reference.parameters())
    assert not {id(p) for p in reference.parameters()} & {id(p) for p in decoder.parameters()}


def test_what_goes_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    decoder = decoder_of()
    with pytest.raises(Diverged, match="rollouts of step 0: overflow"):
        run(decoder, tmp_path / "a", generator=Table(decoder, error="overflow"))
    with pytest.raises(SpecError, match="reward 'bad' gives nan"):
        run(decoder, tmp_path / "b", rewards=[Reward(name="bad", score=lambda a, r: [math.nan] * len(r))])
    with pytest.raises(SpecError, match="reward 'few' gives 1 scores: there are 8"):
        run(decoder, tmp_path / "c", rewards=[Reward(name="few", score=lambda a, r: [1.0])])
    with pytest.raises(SpecError, match="asks: has 1 entries; a batch of answers needs 2"):
        run(decoder, tmp_path / "d", asks=ASKS[:1])
    with pytest.raises(SpecError, match="ask '0': has 600 tokens; the model reads from 1 to 511"):
        run(decoder, tmp_path / "d", render=lambda ask: [5] * 600)
    with pytest.raises(SpecError, match="rewards="):
        run(decoder, tmp_path / "e", rewards=[])
    with torch.no_grad():
        decoder.lm_head.weight.fill_(math.nan)
    with pytest.raises(Diverged, match="overflow"):
        run(decoder, tmp_path / "f")
    assert not list((tmp_path / "f" / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generations": 1}, "generations=1"),
        ({"rows": 9}, "rows=9: a batch of answers must be a multiple of generations=4"),
        ({"micro": 3}, "micro=3"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"clip_low": 1.0}, "clip_low=1.0"),
        ({"beta": -1}, "beta=-1"),
        ({"updates": 3, "rows": 12}, "checkpoint_every=100: must be a multiple of updates=3"),
        ({"linears": "bf16"}, "linears='bf16'"),
        ({"thinking_budget": -1}, "thinking_budget=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as refused:
        replace(QUICK, **change)
    assert str(refused.value).startswith(message)
