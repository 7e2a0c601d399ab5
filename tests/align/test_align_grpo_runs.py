from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from grpo_cases import ASKS, FIRST, QUICK, WANTED, Interrupted, Table, decoder_of, engine, render, run

from tandem.model.generate import Sampling, generate_tokens
from tandem.spec.errors import SpecError


@pytest.mark.slow
def test_a_model_learns_to_emit_a_token(tmp_path: Path) -> None:
    decoder, heard = decoder_of(), []
    settings = replace(QUICK, steps=20, rows=48, generations=16, max_tokens=6, lr=2e-2)
    metrics = run(decoder, tmp_path, settings, listen=heard.append)
    rewards = [event["reward"] for event in heard]
    assert len(rewards) == 20
    assert sum(rewards[:3]) / 3 < 0.1
    assert sum(rewards[-3:]) / 3 > 0.6
    assert heard[0]["kl"] == pytest.approx(0, abs=1e-6) and heard[-1]["kl"] > 0.1  # noqa: PT018
    assert all(event["logprob_gap"] < 1e-4 for event in heard)
    greedy = list(generate_tokens(decoder, render(ASKS[0]), Sampling(max_tokens=6)))
    assert greedy == [WANTED] * 6
    again = engine(decoder).generate(
        [render(ASKS[0])], seeds=[[0]], thinking=[False], thinking_budgets=[None], temperature=0.0, max_tokens=6
    )
    assert list(again[0][0].completion_ids) == greedy
    assert [entry["reward"] for entry in metrics["course"]] == rewards


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=6, checkpoint_every=2, schedule="linear", beta=0.1)
    whole, stopped, heard, later = decoder_of(), decoder_of(), [], []
    expected = run(whole, tmp_path / "whole", settings, listen=heard.append)

    def stop(event: dict[str, Any]) -> None:
        later.append(event)
        if event["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(stopped, tmp_path / "stopped", settings, listen=stop)
    resumed = decoder_of()
    metrics = run(resumed, tmp_path / "stopped", settings, listen=later.append)
    assert [event["step"] for event in later] == [1, 2, 3, 3, 4, 5, 6]
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert [e[name] for e in later[3:]] == [e[name] for e in heard[2:]], name
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert metrics["course"] == expected["course"]
    again = run(decoder_of(), tmp_path / "stopped", settings)
    for name in ("course", "loss", "reward", "kl", "length", "steps"):
        assert metrics[name] == again[name] == expected[name], name
    with pytest.raises(SpecError, match="another lr"):
        run(decoder_of(), tmp_path / "stopped", replace(settings, lr=1e-3))


def test_several_updates_of_a_batch_are_clipped_and_sampled_once(tmp_path: Path) -> None:
    decoder, heard = decoder_of(), []
    table = Table(decoder)
    settings = replace(QUICK, steps=6, updates=3, rows=8, generations=6, lr=0.1, micro=4, checkpoint_every=3)
    assert settings.prompts == 4
    run(decoder, tmp_path, settings, rewards=[FIRST], generator=table, listen=heard.append)
    assert len(table.calls) == 2
    assert ["rollout_s" in event for event in heard] == [True, False, False] * 2
    assert heard[0]["clip_share"] == 0
    assert sum(event["clip_share"] for event in heard) > 0
    assert all(("logprob_gap" in event) == ("rollout_s" in event) for event in heard)
