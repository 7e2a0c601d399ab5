"""The decode step in C against the decoder's full pass in torch, and its own laws: no row knows of the others."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tandem.model import native
from tandem.model.hybrid import Decoder
from tandem.model.state import AttentionState, LayerState, MambaState, SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, MoE, Rope
from tandem.spec.model import ModelSpec

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")
EXAMPLES = settings(deadline=None, max_examples=30)
VOCABULARY = 67

ropes = st.none() | st.builds(
    Rope,
    theta=st.sampled_from([100.0, 1e4]),
    fraction=st.sampled_from([0.5, 1.0]),
    scaling=st.sampled_from(["none", "linear", "llama3"]),
    factor=st.just(2.0),
    original_max_context=st.just(8),
)


@st.composite
def mixers(draw: st.DrawFn) -> Mixer:
    kind = draw(st.sampled_from("M*-E"))
    groups = draw(st.integers(1, 3))
    if kind == "M":
        return Mamba2(
            num_heads=groups * draw(st.integers(1, 3)),
            head_dim=draw(st.integers(1, 19)),
            state_dim=draw(st.integers(1, 40)),
            groups=groups,
            conv_kernel=draw(st.integers(2, 5)),
            conv_bias=draw(st.booleans()),
            proj_bias=draw(st.booleans()),
            dt_min=draw(st.sampled_from([0.0, 0.3])),
            dt_max=draw(st.sampled_from([None, 0.9])),
        )
    if kind == "*":
        return Attention(
            num_heads=groups * draw(st.integers(1, 4)),
            num_kv_heads=groups,
            head_dim=4 * draw(st.integers(1, 12)),
            rope=draw(ropes),
            qk_norm=draw(st.sampled_from(["none", "head"])),
            qkv_bias=draw(st.booleans()),
            out_bias=draw(st.booleans()),
        )
    if kind == "-":
        return MLP(ffn_size=draw(st.integers(1, 150)), gated=draw(st.booleans()), bias=draw(st.booleans()))
    size = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, groups))
    return MoE(
        num_experts=groups * size,
        top_k=draw(st.integers(1, top_groups * size)),
        ffn_size=draw(st.integers(1, 40)),
        gated=False,
        shared_ffn_size=draw(st.integers(0, 30)),
        latent_size=draw(st.none() | st.integers(1, 30)),
        router_bias=True,
        score="sigmoid",
        normalise=draw(st.booleans()),
        score_scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=top_groups,
    )


specs = st.builds(
    ModelSpec,
    name=st.just("drawn"),
    vocab_size=st.just(VOCABULARY),
    hidden_size=st.integers(1, 70),
    layers=st.lists(mixers(), min_size=1, max_size=4).map(tuple),
    tied_embeddings=st.booleans(),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
)


@torch.no_grad()
def pair(spec: ModelSpec, dtype: torch.dtype, seed: int) -> tuple[Decoder, Decoder]:
    """A decoder in that format, and one in fp32 with the same rounded weights, all of a size that matters."""
    model, reference = Decoder(spec, dtype=dtype, seed=seed), Decoder(spec, seed=seed)
    random = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        drawn = torch.randn(value.shape, generator=random)
        state[name] = (value.float() + drawn * (0.3 if value.dim() < 2 else value.shape[-1] ** -0.5)).to(value.dtype)
    model.load_state_dict(state)
    reference.load_state_dict(state)
    return model.requires_grad_(False), reference.requires_grad_(False)


def program_of(model: Decoder) -> native.Program:
    program = native.program_for(model)
    assert isinstance(program, native.Program), program
    return program


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, right-aligned, with their mask."""
    wide = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (wide - len(row), 0)) for row in rows])
    return ids, (torch.arange(wide) >= wide - torch.tensor([len(row) for row in rows])[:, None]).long()


def prefilled(model: Decoder, prompts: list[Tensor]) -> SequenceState:
    """The state after prompts of different lengths."""
    ids, mask = padded(prompts)
    return model.prefill(ids, attention_mask=mask)[1]


def last_logits(model: Decoder, rows: list[Tensor]) -> Tensor:
    """Logits after each row, from one full pass."""
    ids, mask = padded(rows)
    return model(ids, attention_mask=mask)[:, -1]


def draw_prompts(lengths: list[int], seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=random) for length in lengths]


def assert_close(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    assert (ours - reference).abs().max() <= tolerance * max(1.0, float(reference.abs().max()))


@EXAMPLES
@given(
    spec=specs,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    steps=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_prefill_and_native_steps_are_one_full_pass(
    spec: ModelSpec, dtype: torch.dtype, lengths: list[int], steps: int, threads: int, seed: int
) -> None:
    model, reference = pair(spec, dtype, seed)
    whole = draw_prompts([n + steps for n in lengths], seed)
    state = prefilled(reference, [row[:n] for row, n in zip(whole, lengths, strict=True)])
    for step in range(steps):
        ids = torch.stack([row[n + step] for row, n in zip(whole, lengths, strict=True)])
        logits = program_of(model).decode(ids, state, threads=threads)
    assert state.lengths.tolist() == [n + steps for n in lengths]
    tolerance = 1e-4 if any(isinstance(m, MoE) for m in spec.layers) else 2e-5
    for ours, expected in zip(logits, last_logits(reference, whole), strict=True):
        assert_close(ours, expected, tolerance)


HYBRID = ModelSpec(
    name="hybrid",
    vocab_size=VOCABULARY,
    hidden_size=48,
    layers=(
        Mamba2(num_heads=4, head_dim=8, state_dim=16, groups=2),
        Attention(num_heads=6, num_kv_heads=2, head_dim=16, rope=Rope(theta=1e4)),
        MLP(ffn_size=96, gated=True),
        MoE(num_experts=6, top_k=2, ffn_size=20, gated=False, shared_ffn_size=16, router_bias=True, score="sigmoid"),
    ),
)
LONG = [1, 255, 256, 257, 511, 512, 600]
"""Contexts around the chunks that attention is cut into."""


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
def test_long_contexts_and_caches_of_16_bits(kept: torch.dtype) -> None:
    model, reference = pair(HYBRID, torch.float32, 3)
    whole = draw_prompts([n + 1 for n in LONG], 4)
    state = prefilled(reference, [row[:-1] for row in whole])
    for layer in state.layers:
        if isinstance(layer, AttentionState):
            layer.keys, layer.values = layer.keys.to(kept), layer.values.to(kept)
        elif isinstance(layer, MambaState):
            layer.conv = layer.conv.to(kept)
    logits = program_of(model).decode(torch.stack([row[-1] for row in whole]), state, threads=2)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[kept]
    for ours, expected in zip(logits, last_logits(reference, whole), strict=True):
        assert_close(ours, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_sequence_has_the_same_bits_whatever_batch_it_shares(dtype: torch.dtype) -> None:
    model, _ = pair(HYBRID, torch.float32 if dtype == torch.int8 else dtype, 5)
    if dtype == torch.int8:
        native.quantise(model)
    known, program = prefilled(model, draw_prompts([*LONG, 5], 6)), program_of(model)

    @settings(deadline=None, max_examples=15)
    @given(rows=st.lists(st.integers(0, len(LONG)), min_size=1, max_size=12), threads=st.integers(1, 4), data=st.data())
    def holds(rows: list[int], threads: int, data: st.DataObject) -> None:
        chosen = data.draw(st.integers(0, len(rows) - 1))
        state, alone = known.slice(rows), known.slice([rows[chosen]])
        ids = torch.arange(len(rows)) % VOCABULARY
        together = program.decode(ids, state, threads=threads)
        single = program.decode(ids[chosen : chosen + 1], alone, threads=1)
        assert torch.equal(together[chosen], single[0])
        assert state.slice([chosen]).to_bytes() == alone.to_bytes()

    holds()


def paged(state: SequenceState, block_size: int, seed: int) -> tuple[list[LayerState], Tensor, Tensor]:
    """The same state in blocks and slots of random order, with room for a token more: layers, block table, slots."""
    random = torch.Generator().manual_seed(seed)
    batch, most = state.batch, int(state.lengths.max()) // block_size + 1
    table = torch.randperm(batch * most + 3, generator=random)[: batch * most].view(batch, most)
    slots = torch.randperm(batch + 2, generator=random)[:batch]
    layers: list[LayerState] = []
    for layer in state.layers:
        if isinstance(layer, AttentionState):
            pools = []
            for tensor in layer.tensors:
                pool = torch.full((batch * most + 3, tensor.shape[1], block_size, tensor.shape[3]), torch.nan)
                for row, length in enumerate(state.lengths.tolist()):
                    for t in range(length):
                        pool[table[row, t // block_size], :, t % block_size] = tensor[row, :, t]
                pools.append(pool)
            layers.append(AttentionState(*pools))
        elif isinstance(layer, MambaState):
            conv, ssm = (t.new_full((batch + 2, *t.shape[1:]), torch.nan) for t in layer.tensors)
            conv[slots], ssm[slots] = layer.tensors
            layers.append(MambaState(conv, ssm))
        else:
            layers.append(None)
    return layers, table, slots


@pytest.mark.parametrize("block_size", [1, 7, 16, 300])
def test_paged_state_gives_the_same_bits_as_a_contiguous_one(block_size: int) -> None:
    model, _ = pair(HYBRID, torch.float32, 7)
    state = prefilled(model, draw_prompts([3, 70, 300], 8))
    layers, table, slots = paged(state, block_size, 9)
    ids, lengths = torch.tensor([1, 2, 3]), state.lengths.clone()
    program = program_of(model)
    ours = program.run(ids, lengths, layers, blocks=table, block_size=block_size, slots=slots)
    assert torch.equal(lengths, state.lengths)
    assert torch.equal(ours, program.decode(ids, state))


def test_weights_are_read_where_they_lie_and_replaced_ones_are_noticed() -> None:
    model, reference = pair(HYBRID, torch.float32, 10)
    prompt = draw_prompts([6], 11)
    start, ids = prefilled(reference, prompt), torch.tensor([4])
    first = program_of(model)
    before = first.decode(ids, start.clone())
    model.lm_head.weight.mul_(2)  # in place, as an optimiser does
    assert torch.equal(first.decode(ids, start.clone()), before * 2)
    assert native.program_for(model) is first
    model.half()
    halved = program_of(model)
    assert halved is not first
    assert_close(halved.decode(ids, start.clone()), before * 2, 1e-2)
    native.quantise(model)
    assert program_of(model) is not halved
    assert_close(program_of(model).decode(ids, start.clone()), before * 2, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([VOCABULARY])}, "ids holds 67"),
        ({"ids": torch.tensor([-1])}, "ids holds -1"),
        ({"slots": torch.tensor([1])}, "slots holds 1"),
        ({"blocks": torch.tensor([[1]])}, "blocks holds 1"),
        ({"lengths": torch.tensor([9])}, "lengths holds 9"),
        ({"block_size": 4}, "block_size is 4"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(change: dict[str, Tensor], message: str) -> None:
    model, _ = pair(HYBRID, torch.float32, 12)
    state = SequenceState.zeros(HYBRID, 1, capacity=9)
    right = {"lengths": state.lengths, "blocks": torch.tensor([[0]]), "slots": torch.tensor([0]), "block_size": 9}
    with pytest.raises(SpecError, match=message):
        program_of(model).run(**{"ids": torch.tensor([1]), "states": state.layers, **right, **change})


class Adapted(nn.Module):
    """A layer of another library around a Linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_a_model_that_c_cannot_read_is_refused_with_the_reason() -> None:
    model = Decoder(replace(HYBRID, layers=HYBRID.layers[:1]))
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = Adapted(mixer.in_proj)
    refusal = native.program_for(model)
    assert isinstance(refusal, Infeasible)
    assert "in_proj is a Adapted" in refusal.reason


FORK = """
import os, torch
from tandem.model import native
weight, x = torch.randn(300, 200), torch.randn(40, 200)
before = native.linear(x, weight, threads=3)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native.linear(x, weight, threads=3), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(native.linear(x, weight, threads=3), before)
"""


def test_a_forked_child_makes_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)
