from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import small_model
from torch import Tensor
from torch.nn import functional

pytest.importorskip("trl", reason="pip install tandem-lm[train]")

from tandem.align.dpo import DpoSettings, EncodedPair, dpo_trainer, encode_pairs, run_dpo
from tandem.align.encode import encode_pair
from tandem.align.sample import Ask, Pair
from tandem.align.trl import contained
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.train.data.bpe import train_bpe

TOKENIZER = train_bpe(["What is it? It is good, it is very bad."] * 4, 300)


def pair(i: int, chosen: str = "good", rejected: str = "very bad") -> Pair:
    ask = Ask(id=str(i), kind="chat", task="t", messages=({"role": "user", "content": f"What is {i}?"},))
    return Pair(ask=ask, chosen=f"a thought\n</think>\n\n{chosen}", rejected=f"other\n</think>\n\n{rejected} {i}")


PAIRS = [pair(i) for i in range(6)]
ENCODED = [EncodedPair(*encode_pair(p, TOKENIZER)) for p in PAIRS]
SETTINGS = DpoSettings(steps=4, rows=2, lr=1e-3, checkpoint_every=1)


def decoder_of(seed: int = 0) -> Decoder:
    return small_model("hybrid", vocabulary=TOKENIZER.backend.get_vocab_size(), seed=seed)


def logp(decoder: Decoder, prompt: list[int], answer: list[int]) -> Tensor:
    """The log-probability of an answer, by softmax of the decoder's logits."""
    ids = torch.tensor(prompt + answer)
    found = functional.log_softmax(decoder(ids[None])[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    return found[len(prompt) - 1 :].sum()


def dpo_loss(policy: Decoder, reference: Decoder, some: list[EncodedPair], beta: float) -> Tensor:
    gains = [
        (logp(policy, p.prompt, p.chosen) - logp(reference, p.prompt, p.chosen).detach())
        - (logp(policy, p.prompt, p.rejected) - logp(reference, p.prompt, p.rejected).detach())
        for p in some
    ]
    return -functional.logsigmoid(beta * torch.stack(gains)).mean()


def gradients(decoder: Decoder, loss: Tensor) -> Tensor:
    decoder.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])


def same_weights(one: Decoder, other: Decoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def moved(decoder: Decoder) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight += 0.02 * torch.randn_like(weight)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_trainers_loss_is_the_formula(tmp_path: Path, beta: float) -> None:
    policy, reference = decoder_of(), decoder_of()
    fields = {**SETTINGS.to_json(), "beta": beta, "rows": 3}
    with contained():
        trainer = dpo_trainer(policy, TOKENIZER, ENCODED, DpoSettings(**fields), tmp_path, seed=0)
    rows = [trainer.train_dataset[i] for i in range(3)]
    batch = trainer.data_collator(rows)
    first = trainer.compute_loss(trainer.model, dict(batch))
    assert first.item() == pytest.approx(math.log(2), abs=1e-5), "policy and reference are one at the beginning"
    moved(policy)
    found, expected = trainer.compute_loss(trainer.model, dict(batch)), dpo_loss(policy, reference, ENCODED[:3], beta)
    assert abs(expected.item() - math.log(2)) > 0.01
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, plain = gradients(policy, found), gradients(policy, expected)
    assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()


NUMBERS = st.lists(st.floats(-20, 0, width=32), min_size=4, max_size=4)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=st.lists(NUMBERS, min_size=4, max_size=4), reference=NUMBERS, beta=st.sampled_from([0.05, 0.3, 1.0]))
def test_the_loss_of_given_log_probabilities(
    shared_trainer: Any, policy: list[list[float]], reference: list[float], beta: float
) -> None:
    """Two pairs of four tokens after a prompt of two, the last row one token shorter."""
    shared_trainer.beta = beta
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3 + [[0, 0, 1, 1, 1, 0]])
    inner = torch.tensor(policy) * mask[:, 2:]
    per_token = functional.pad(inner, (1, 0))  # the first prompt token predicts the second, which is not learned
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )
    inputs = {
        "input_ids": torch.ones(4, 6, dtype=torch.int64),
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(reference[:2]),
        "ref_rejected_logps": torch.tensor(reference[2:]),
    }
    found = shared_trainer.compute_loss(lambda **kwargs: outputs, inputs).item()
    sums, losses = inner.double().sum(1).tolist(), []
    for i in range(2):
        gain = (sums[i] - reference[i]) - (sums[2 + i] - reference[2 + i])
        losses.append(math.log1p(math.exp(-beta * gain)) if beta * gain > -30 else -beta * gain)
    assert found == pytest.approx(sum(losses) / 2, abs=1e-5, rel=1e-5)


@pytest.fixture(scope="module")
def shared_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with contained():
        return dpo_trainer(decoder_of(), TOKENIZER, ENCODED, SETTINGS, tmp_path_factory.mktemp("dpo"), seed=0)


def test_the_chosen_answers_own_likelihood_can_be_added(tmp_path: Path) -> None:
    policy = decoder_of()
    settings = DpoSettings(**{**SETTINGS.to_json(), "sft_weight": 0.5})
    with contained():
        trainer = dpo_trainer(policy, TOKENIZER, ENCODED, settings, tmp_path, seed=0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    nll = -sum(logp(policy, p.prompt, p.chosen) for p in ENCODED[:2]) / sum(len(p.chosen) for p in ENCODED[:2])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2) + 0.5 * nll.item(), abs=1e-5)


def test_it_learns_what_is_preferred(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder, reference, events = decoder_of(), decoder_of(), []
    found = run_dpo(decoder, TOKENIZER, PAIRS, DpoSettings(steps=15, rows=6, lr=3e-3), tmp_path, seed=0, listen=events.append)
    assert events[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["loss"] < 0.3
    assert events[-1]["accuracy"] == 1
    assert events[-1]["margin"] > 0.5
    assert [found[name] for name in ("accuracy", "margin")] == [events[-1][name] for name in ("accuracy", "margin")]
    told = [{name: event[name] for name in ("step", "loss", "accuracy", "margin")} for event in events]
    assert found["course"] == told
    for p in ENCODED:
        gain = logp(decoder, p.prompt, p.chosen) - logp(reference, p.prompt, p.chosen)
        assert gain > logp(decoder, p.prompt, p.rejected) - logp(reference, p.prompt, p.rejected)
    assert found["pairs"] == 6
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_round_keeps_its_reference(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            raise KeyboardInterrupt

    whole, again = decoder_of(), decoder_of()
    run_dpo(whole, TOKENIZER, PAIRS, SETTINGS, tmp_path / "whole", seed=0)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(decoder_of(), TOKENIZER, PAIRS, SETTINGS, tmp_path / "cut", seed=0, listen=stop)
    run_dpo(again, TOKENIZER, PAIRS, SETTINGS, tmp_path / "cut", seed=0)
    assert same_weights(again, whole)


def test_a_second_round_begins_at_its_own_start(tmp_path: Path) -> None:
    decoder, events = decoder_of(), []
    run_dpo(decoder, TOKENIZER, PAIRS, DpoSettings(steps=3, rows=2, lr=3e-3), tmp_path / "1", seed=0)
    run_dpo(decoder, TOKENIZER, PAIRS[:2], DpoSettings(steps=1, rows=2), tmp_path / "2", seed=1, listen=events.append)
    assert events[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_long_pairs_are_left_out_and_counted() -> None:
    long = pair(7, rejected="very bad " * 50)
    kept, left_out = encode_pairs([*PAIRS, long], TOKENIZER, max(p.length for p in ENCODED))
    assert (kept, left_out) == (ENCODED, 1)


@pytest.mark.parametrize(
    ("message", "pairs", "length"),
    [
        (r"pairs=\[\]: nothing to learn from", [], 512),
        ("length=9: every pair is longer, the shortest", PAIRS, 9),
        (r"pairs\[1\] of '3': both answers are", [PAIRS[0], Pair(ask=PAIRS[3].ask, chosen="a", rejected="a")], 512),
    ],
)
def test_pairs_that_teach_nothing_are_refused(tmp_path: Path, message: str, pairs: list[Pair], length: int) -> None:
    with pytest.raises(SpecError, match=message):
        run_dpo(decoder_of(), TOKENIZER, pairs, DpoSettings(steps=1, length=length), tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["beta", "sft_weight", "length"])
def test_settings_of_preferences_are_checked(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field}=-1"):
        DpoSettings(steps=1, **{field: -1})
