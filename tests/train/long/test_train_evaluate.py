"""Evaluation of base models: greedy in batches is greedy alone, losses are those of torch, intervals those of scipy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy

from tandem.model.generate import Sampling, generate_tokens
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, Rope
from tandem.train.evaluate import (
    Accuracy,
    evaluating,
    generate_greedy,
    held_out_loss,
    prompt_ids,
    samples,
    task_accuracy,
    wilson_interval,
)

torch.set_num_threads(1)

MAMBA = Mamba2(num_heads=4, head_dim=16, state_dim=16, groups=2)
FFN = MLP(ffn_size=64, gated=False)
PATTERNS: dict[str, tuple[Mixer, ...]] = {
    "hybrid": (MAMBA, FFN, Attention(num_heads=4, num_kv_heads=2, head_dim=8), MAMBA, FFN),
    "transformer": (Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rope(theta=1e4)), FFN) * 2,
}


def decoder(kind: str, seed: int = 0, vocab_size: int = 96) -> Decoder:
    spec = ModelSpec(name=kind, vocab_size=vocab_size, hidden_size=32, layers=PATTERNS[kind], max_context=512)
    model = Decoder(spec, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():  # fresh weights are small: greedy would repeat one token for ever
            weight.mul_(4.0)
    return model


def byte_tokenizer() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    return Tokenizer(backend, special={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("batch", [3, 32])
def test_batched_greedy_is_greedy_alone(kind: str, batch: int) -> None:
    model = decoder(kind)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, 96, size=n).tolist() for n in (1, 70, 5, 2, 33, 129, 4, 64, 17, 3, 2, 90)]
    alone = [list(generate_tokens(model, prompt, Sampling(max_tokens=24))) for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) == len(alone)
    assert generate_greedy(model, prompts, 24, batch=batch) == alone
    stops = {answer[i] for i, answer in enumerate(alone)}  # so that rows end at different steps
    cut = [answer[: next((i for i, token in enumerate(answer) if token in stops), None)] for answer in alone]
    assert len({len(answer) for answer in cut}) > 3
    assert generate_greedy(model, prompts, 24, stops, batch=batch) == cut


def test_greedy_refuses_an_empty_prompt_and_takes_none() -> None:
    model = decoder("hybrid")
    assert generate_greedy(model, [], 4) == []
    with pytest.raises(SpecError, match=r"prompts\[1\]"):
        generate_greedy(model, [[3], []], 4)
    with pytest.raises(SpecError, match="max_tokens=0"):
        generate_greedy(model, [[3]], 0)


@dataclass
class Rows:
    input_ids: np.ndarray
    labels: np.ndarray
    documents: np.ndarray


def rows(draw: np.random.Generator, shape: tuple[int, int], learned: float) -> Rows:
    ids = draw.integers(0, 96, size=shape)
    labels = np.where(draw.random(shape) < learned, draw.integers(0, 96, size=shape), -100)
    return Rows(ids, labels, np.sort(draw.integers(0, 3, size=shape), axis=1))


@pytest.mark.parametrize("kind", PATTERNS)
def test_held_out_loss_is_the_mean_over_all_learned_tokens(kind: str) -> None:
    model, draw = decoder(kind), np.random.default_rng(2)
    batches = [rows(draw, (2, 40), 0.9), rows(draw, (3, 16), 0.05)]  # a mean of means would weigh the few tokens too much
    losses = []
    with torch.no_grad():
        for batch in batches:
            logits = model(torch.tensor(batch.input_ids), documents=torch.tensor(batch.documents))
            each = cross_entropy(logits.flatten(0, 1), torch.tensor(batch.labels).flatten(), reduction="none")
            losses += each[torch.tensor(batch.labels).flatten() != -100].tolist()
    assert held_out_loss(model, batches) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    with pytest.raises(SpecError, match="no learned token"):
        held_out_loss(model, [rows(draw, (1, 8), 0.0)])


def test_the_model_is_as_it_was() -> None:
    model, draw = decoder("hybrid"), np.random.default_rng(3)
    model.train()
    model.backbone.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    held_out_loss(model, [rows(draw, (1, 8), 1.0)])
    generate_greedy(model, [[3, 4]], 4)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(weight.grad is None for weight in model.parameters())
    with evaluating(model):
        inside = [module.training for module in model.modules()]
        assert not torch.is_grad_enabled()
    assert not any(inside)
    assert [module.training for module in model.modules()] == modes


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_interval_is_that_of_scipy(pair: tuple[int, int]) -> None:
    correct, count = pair
    expected = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    accuracy = Accuracy(correct=correct, count=count)
    assert 0 <= accuracy.low <= accuracy.share <= accuracy.high <= 1
    assert accuracy.high > accuracy.low


def test_accuracy_refuses_what_cannot_be() -> None:
    with pytest.raises(SpecError, match="correct=3"):
        Accuracy(correct=3, count=2)
    with pytest.raises(SpecError, match="count=0"):
        Accuracy(correct=0, count=0)


def test_prompts_begin_as_documents_do() -> None:
    tokenizer = byte_tokenizer()
    ids = prompt_ids(tokenizer, "a b")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "a b"
    model = decoder("hybrid", vocab_size=259)
    texts = samples(model, tokenizer, ["a b", "longer text\n"], max_tokens=8)
    for text, prompt in zip(texts, ["a b", "longer text\n"], strict=True):
        ids = list(generate_tokens(model, prompt_ids(tokenizer, prompt), Sampling(max_tokens=8)))
        assert text == tokenizer.decode(ids[: ids.index(2)] if 2 in ids else ids)


def test_task_accuracy_counts_verified_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    procedural = pytest.importorskip("tandem.train.data.procedural")
    problems = procedural.make_problems("chain_sum", 6, 10**9)
    answers = [f"{problem.derivation}\n</think>\n{problem.answer}" for problem in problems]
    answers[2] = answers[2] + "1"
    monkeypatch.setattr("tandem.train.evaluate.samples", lambda *args, **options: answers)
    model, tokenizer = decoder("hybrid"), byte_tokenizer()
    assert task_accuracy(model, tokenizer, "chain_sum", problems) == Accuracy(correct=5, count=6)
