from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import KINDS, small_model
from torch import Tensor
from torch.nn import functional

pytest.importorskip("trl", reason="pip install tandem-lm[train]")

from tandem.align import reward_model
from tandem.align.dpo import EncodedPair
from tandem.align.encode import encode_answer, encode_ask, encode_pair
from tandem.align.reward_model import (
    RewardModel,
    RewardSettings,
    pair_accuracy,
    reward_trainer,
    score,
    split_pairs,
    train_reward_model,
)
from tandem.align.sample import Ask, Pair
from tandem.align.trl import contained
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.train.data.bpe import train_bpe

TOKENIZER = train_bpe(["What is it? It is good, it is very bad."] * 4, 300)
VOCABULARY = TOKENIZER.backend.get_vocab_size()


def ask(i: int) -> Ask:
    return Ask(id=str(i), kind="chat", task="t", messages=({"role": "user", "content": f"What is {i}?"},))


def pairs_of(count: int) -> list[Pair]:
    """The better answer ends politely; what is in front of that says nothing."""
    return [
        Pair(ask=ask(i), chosen=f"{i * j % 10} it is. thanks", rejected=f"{i + j} it is. no")
        for i in range(count)
        for j in (1, 7)
    ]


PAIRS = pairs_of(10)
ENCODED = [EncodedPair(*encode_pair(p, TOKENIZER)) for p in PAIRS]
SETTINGS = RewardSettings(steps=4, rows=3, lr=1e-3, checkpoint_every=1)


def decoder_of(seed: int = 0, kind: str = "hybrid") -> Decoder:
    return small_model(kind, vocabulary=VOCABULARY, seed=seed)


def model_of(seed: int = 0, kind: str = "hybrid") -> RewardModel:
    model = RewardModel(decoder_of(seed, kind))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def reward_of(model: RewardModel, ids: list[int]) -> Tensor:
    """By the decoder's own hidden states."""
    return model.model.decoder.hidden_states(torch.tensor([ids]))[0, -1] @ model.score.weight[0]


def rows_of(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_neither_padding_nor_packing_changes_a_reward(kind: str, lengths: list[int], seed: int) -> None:
    model, rows = model_of(seed, kind), rows_of(seed, lengths)
    expected = torch.stack([reward_of(model, row) for row in rows])
    width = max(lengths) + 2
    right = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    packed = torch.tensor([[token for row in rows for token in row] + [0, 0]])
    documents = torch.tensor([[n for n, row in enumerate(rows) for _ in row] + [len(rows)] * 2])
    known = torch.tensor([[1] * sum(lengths) + [0, 0]])
    with torch.no_grad():
        for found in (model(right, mask), model(left, mask.flip(1)), model(packed, known, documents)):
            assert found.logits.shape == (len(rows), 1)
            assert torch.allclose(found.logits[:, 0], expected, atol=1e-4)
    assert model.rewards(rows, tokens=60) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_the_trainers_loss_is_that_of_bradley_and_terry(tmp_path: Path, centre: float) -> None:
    model = model_of()
    with contained():
        fields = {**SETTINGS.to_json(), "centre": centre}
        trainer = reward_trainer(model, TOKENIZER, ENCODED, RewardSettings(**fields), tmp_path, seed=0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    found = trainer.compute_loss(model, batch)
    chosen = torch.stack([reward_of(model, p.prompt + p.chosen) for p in ENCODED[:3]])
    rejected = torch.stack([reward_of(model, p.prompt + p.rejected) for p in ENCODED[:3]])
    expected = -functional.logsigmoid(chosen - rejected).mean() + centre * ((chosen + rejected) ** 2).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (found, expected)]
    for ours, plain in zip(*grads, strict=True):
        assert torch.allclose(ours, plain, atol=1e-4 * float(plain.abs().max()) + 1e-6)


def test_it_learns_which_answer_is_better(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []
    pairs = pairs_of(40)
    settings = RewardSettings(epochs=4, rows=8, lr=3e-3, held_out=0.3)
    model, found = train_reward_model(decoder_of(), TOKENIZER, pairs, settings, tmp_path, seed=0, listen=events.append)
    assert events[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the head is zero at first"
    assert events[-1]["accuracy"] == 1
    assert found["held_out"]["accuracy"] > 0.9
    assert found["held_out"]["count"] + found["pairs"] == len(pairs)
    fresh = Pair(ask=ask(77), chosen="5 it is. thanks", rejected="3 it is. no")
    better, worse = score(model, TOKENIZER, [(fresh.ask, fresh.chosen), (fresh.ask, fresh.rejected)])
    assert better > worse
    assert pair_accuracy(model, TOKENIZER, [fresh]).correct == 1
    assert capfd.readouterr() == ("", "")


def test_scores_are_those_of_prompt_and_ended_answer() -> None:
    model = model_of()
    asked = [(p.ask, p.chosen) for p in PAIRS]
    expected = [reward_of(model, encode_ask(a, TOKENIZER) + encode_answer(text, TOKENIZER)).item() for a, text in asked]
    assert score(model, TOKENIZER, asked) == pytest.approx(expected, abs=1e-4)
    assert score(model, TOKENIZER, []) == []
    with pytest.raises(SpecError, match="rows: one is empty"):
        model.rewards([[1], []])


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            raise KeyboardInterrupt

    whole, _ = train_reward_model(decoder_of(), TOKENIZER, PAIRS, SETTINGS, tmp_path / "whole", seed=0)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(decoder_of(), TOKENIZER, PAIRS, SETTINGS, tmp_path / "cut", seed=0, listen=stop)
    again, _ = train_reward_model(decoder_of(), TOKENIZER, PAIRS, SETTINGS, tmp_path / "cut", seed=0)
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert whole.score.weight.abs().max() > 0


def test_a_question_is_on_one_side_whatever_the_order() -> None:
    learned, held_out = split_pairs(PAIRS, 0.4, 3)
    assert learned
    assert held_out
    assert not {p.ask.id for p in learned} & {p.ask.id for p in held_out}
    again = split_pairs(PAIRS[::-1], 0.4, 3)
    assert (again[0][::-1], again[1][::-1]) == (learned, held_out)
    assert split_pairs(PAIRS, 0.0, 3) == (PAIRS, [])


def test_nothing_held_out_is_said_by_none(tmp_path: Path) -> None:
    settings = RewardSettings(steps=1, rows=2, held_out=0.0)
    _, found = train_reward_model(decoder_of(), TOKENIZER, PAIRS[:2], settings, tmp_path, seed=0)
    assert found["held_out"] is None
    assert found["pairs"] == 2


def test_a_saved_model_reads_back_and_scores_the_same(tmp_path: Path) -> None:
    model, rows = model_of(), rows_of(0, [5, 9])
    model.save(tmp_path / "model")
    again = RewardModel.load(tmp_path / "model")
    assert again.rewards(rows) == model.rewards(rows)
    model_of(1).save(tmp_path / "model")
    assert RewardModel.load(tmp_path / "model").rewards(rows) == model_of(1).rewards(rows)


def test_a_model_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(reward_model, "save_model", fail)
    with pytest.raises(OSError, match="no space"):
        model_of().save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model_of().save(folder)
    head = folder / "reward_head.safetensors"
    for tensors in ({"weight": torch.zeros(1, 7)}, {"other": torch.zeros(1, 32)}):
        save_file(tensors, head)
        with pytest.raises(SpecError, match=r"is not of this model; it must hold weight \[1, 32\]"):
            RewardModel.load(folder)
    head.write_bytes(b"junk")
    with pytest.raises(SpecError, match="cannot be read"):
        RewardModel.load(folder)
    head.unlink()
    with pytest.raises(SpecError, match="holds no reward_head"):
        RewardModel.load(folder)


def test_rows_without_one_piece_of_tokens_are_refused() -> None:
    model = model_of()
    for mask in ([[0, 0, 0]], [[1, 0, 1]]):
        with pytest.raises(SpecError, match="each row must hold tokens"):
            model(torch.ones(1, 3, dtype=torch.int64), torch.tensor(mask))


@pytest.mark.parametrize("field", ["held_out", "centre", "length"])
def test_settings_of_reward_models_are_checked(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field}=-1"):
        RewardSettings(steps=1, **{field: -1})


def test_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"pairs=\[\]"):
        train_reward_model(decoder_of(), TOKENIZER, [], SETTINGS, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()
