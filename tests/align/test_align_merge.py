"""Merging: the formula to the bit, ends that are the originals, nothing half written, an optimum between two skills."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tandem import load_model, save_model
from tandem.align import merge
from tandem.align.merge import merge_decoders, merge_folders, merge_sweep, merge_tensors
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec

SPEC = ModelSpec(
    name="toy",
    vocab_size=16,
    hidden_size=32,
    layers=(
        Mamba2(num_heads=4, head_dim=16, state_dim=8, groups=1, conv_kernel=4),
        Attention(num_heads=2, num_kv_heads=1, head_dim=16),
        MLP(ffn_size=64, gated=False),
    ),
    max_context=64,
)


def decoder(seed: int, dtype: torch.dtype = torch.float32, spec: ModelSpec = SPEC) -> Decoder:
    return Decoder(spec, seed=seed, dtype=dtype)


def saved(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **options: int) -> Path:
    save_model(decoder(seed, dtype), folder, **options)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-100, 100, width=32)] * 2), min_size=1, max_size=8),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_formula(numbers: list[tuple[float, float]], alpha: float, dtype: torch.dtype) -> None:
    first, second = (torch.tensor(column).to(dtype) for column in zip(*numbers, strict=True))
    merged = merge_tensors(first, second, alpha)
    assert merged.dtype == dtype
    exact = (1 - alpha) * first.double() + alpha * second.double()
    torch.testing.assert_close(merged.double(), exact.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    if dtype == torch.float32:
        assert torch.equal(merged, (1 - alpha) * first + alpha * second) or alpha in (0, 1)


def test_ends_are_the_originals_to_the_bit() -> None:
    """Also numbers that 0 * w would change: a negative zero, infinities."""
    first, second = torch.tensor([-0.0, math.inf, 1.0]), torch.tensor([0.0, 2.0, -math.inf])
    assert [math.copysign(1, x) for x in merge_tensors(first, second, 0.0).tolist()] == [-1, 1, 1]
    assert torch.equal(merge_tensors(first, second, 0.0), first)
    assert torch.equal(merge_tensors(first, second, 1.0), second)
    result = merge_tensors(first, second, 0.0)
    result[0] = 5
    assert first[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [2**20, 100])
def test_folders_and_decoders_merge_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    """The second's weights lie in several files, in other places; pieces of any size give the same."""
    monkeypatch.setattr(merge, "_PIECE", piece)
    first, second = saved(tmp_path / "a", 1, dtype), saved(tmp_path / "b", 2, dtype, max_shard_bytes=5000)
    assert len(list(second.glob("*.safetensors"))) > 1
    for alpha in (0, 0.25, 1.0):
        out = tmp_path / f"out-{alpha}"
        merge_folders(first, second, out, alpha=alpha)
        ours, theirs, merged = weights(first), weights(second), weights(out)
        assert list(merged) == list(ours)
        for name, tensor in merged.items():
            assert tensor.dtype == ours[name].dtype
            expected = ((1 - alpha) * ours[name].float() + alpha * theirs[name].float()).to(tensor.dtype)
            assert torch.equal(tensor, expected), name
        in_memory = merge_decoders(load_model(first, dtype="auto"), load_model(second, dtype="auto"), alpha=alpha)
        for (name, tensor), (_, same) in zip(
            in_memory.state_dict().items(), load_model(out, dtype="auto").state_dict().items(), strict=True
        ):
            assert torch.equal(tensor, same), name
    assert files(tmp_path / "out-0") == files(first)
    merge_folders(second, first, tmp_path / "many", alpha=0.75)
    again = weights(tmp_path / "many")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(tmp_path / "out-0.25").items())


def test_originals_stay_as_they_are(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2)
    before = files(first), files(second)
    merge_folders(first, second, tmp_path / "out", alpha=0.5)
    assert (files(first), files(second)) == before
    one, other = decoder(1), decoder(2)
    kept = [{name: t.clone() for name, t in model.state_dict().items()} for model in (one, other)]
    merged = merge_decoders(one, other, alpha=0.5)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    for model, state in zip((one, other), kept, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_is_not_of_one_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", 1)
    out = tmp_path / "out"

    def refused(second: Path, match: str, alpha: float = 0.5, to: Path = out) -> None:
        with pytest.raises(SpecError, match=match) as error:
            merge_folders(first, second, to, alpha=alpha)
        assert "\n" not in str(error.value)
        assert not out.exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    refused(saved(tmp_path / "bf16", 2, torch.bfloat16), r"is F32 .* in the first and BF16")
    wider = ModelSpec(name="toy", vocab_size=17, hidden_size=32, layers=SPEC.layers, max_context=64)
    save_model(decoder(2, spec=wider), tmp_path / "wide")
    refused(tmp_path / "wide", "another model")
    good = saved(tmp_path / "b", 2)
    refused(good, "alpha=1.5: must be from 0", alpha=1.5)
    refused(good, "alpha=nan: must be from 0", alpha=math.nan)
    refused(good, "alpha=True", alpha=True)
    refused(good, "is one of the two", to=good)
    refused(tmp_path / "none", "none")
    fewer = weights(good)
    lost = fewer.pop("backbone.norm_f.weight")
    save_file(fewer, good / "model.safetensors", metadata={"format": "pt"})
    refused(good, "norm_f.weight: only in the first")
    save_file(
        {**fewer, "backbone.norm_f.weight": lost, "x": lost.clone()}, good / "model.safetensors", metadata={"format": "pt"}
    )
    refused(good, "x: only in the second")
    save_file({**fewer, "backbone.norm_f.weight": lost[:-1].clone()}, good / "model.safetensors", metadata={"format": "pt"})
    refused(good, r"norm_f.weight: is F32 \(32,\) in the first and F32 \(31,\)")
    with pytest.raises(SpecError, match="another model"):
        merge_decoders(decoder(1), decoder(1, spec=wider), alpha=0.5)
    with pytest.raises(SpecError, match=r"float32 .* in the first and torch.bfloat16"):
        merge_decoders(decoder(1), decoder(1, torch.bfloat16), alpha=0.5)


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2)
    for folder, word in ((first, "a"), (second, "b")):
        vocabulary = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {word: 0}, "unk_token": word}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(SpecError, match="its tokenizer has another vocabulary"):
        merge_folders(first, second, tmp_path / "out", alpha=0.5)
    (second / "tokenizer.json").write_text((first / "tokenizer.json").read_text())
    merge_folders(first, second, tmp_path / "out", alpha=0.5)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2)

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(merge, "copy_tokenizer", fails)
    with pytest.raises(OSError, match="no space"):
        merge_folders(first, second, tmp_path / "out", alpha=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def skilled(base: Decoder, prompt: int, answer: int) -> Decoder:
    """The base, trained to answer one token with another."""
    model = merge_decoders(base, base, alpha=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        loss = skill_loss(model, prompt, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def skill_loss(model: Decoder, prompt: int, answer: int) -> torch.Tensor:
    return functional.cross_entropy(model(torch.tensor([[prompt]]))[0], torch.tensor([answer]))


def test_two_skills_are_best_together_between_the_ends() -> None:
    base = decoder(0)
    one, other = skilled(base, 3, 7), skilled(base, 4, 9)

    def score(_: float, model: Decoder) -> float:
        with torch.no_grad():
            return -float(skill_loss(model, 3, 7) + skill_loss(model, 4, 9))

    sweep = merge_sweep(one, other, [i / 10 for i in range(11)], score)
    found = dict(sweep.scores)
    assert list(found) == [i / 10 for i in range(11)]
    assert 0.2 <= sweep.best <= 0.8
    assert found[sweep.best] == max(found.values()) > max(found[0.0], found[1.0]) + 0.1
    assert found[0.0] == score(0.0, one)
    assert found[1.0] == score(1.0, other)


def test_sweep_needs_numbers() -> None:
    one = decoder(0)
    with pytest.raises(SpecError, match="alphas="):
        merge_sweep(one, one, [], lambda *_: 0.0)
    with pytest.raises(SpecError, match=r"alpha=1.1: must"):
        merge_sweep(one, one, [0, 1.1], lambda *_: 0.0)
    with pytest.raises(SpecError, match=r"alpha=0.0: its score is no number"):
        merge_sweep(one, one, [0, 0.5], lambda *_: math.nan)
    assert merge_sweep(one, one, [0.3, 0.1], lambda *_: 1.0).best == 0.3
