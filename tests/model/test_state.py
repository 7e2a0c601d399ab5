"""State of sequences: whatever way it was made, moved, cut and joined, what follows is one full pass."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from specs import TOLERANCE, any_models, build, tokens
from torch import Tensor

from tandem.model import hybrid
from tandem.model.hybrid import Decoder
from tandem.model.state import SequenceState
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, Rope
from tandem.spec.model import ModelSpec

pytestmark = pytest.mark.usefixtures("arithmetic")
SEEDS = st.integers(0, 2**31)
EXAMPLES = settings(deadline=None, max_examples=8, derandomize=True, phases=[Phase.explicit, Phase.generate])
LENGTHS = st.integers(1, 20)
SPEC = ModelSpec(
    name="small",
    vocab_size=23,
    hidden_size=12,
    layers=(
        Mamba2(num_heads=4, head_dim=3, state_dim=5, groups=2),
        Attention(num_heads=4, num_kv_heads=2, head_dim=6, rope=Rope(theta=100.0)),
        MLP(ffn_size=16, gated=True),
        Mamba2(num_heads=2, head_dim=4, state_dim=3, groups=1, conv_kernel=2),
    ),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def close(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item() <= TOLERANCE


def moved(state: SequenceState) -> SequenceState:
    return SequenceState.from_bytes(state.to_bytes())


def decode_all(model: Decoder, ids: Tensor, state: SequenceState) -> Tensor:
    """Logits of these tokens, one step each."""
    return torch.stack([model.decode(ids[:, t], state)[0] for t in range(ids.shape[1])], 1)


@torch.no_grad()
def test_decode_after_a_move_is_one_full_pass_for_every_cut() -> None:
    model = build(SPEC)
    ids = tokens(SPEC, 2, 14)
    whole = model(ids)
    for cut in range(1, 14):
        last, state = model.prefill(ids[:, :cut])
        assert close(last[:, 0], whole[:, cut - 1])
        assert close(decode_all(model, ids[:, cut:], moved(state)), whole[:, cut:])


@EXAMPLES
@given(spec=any_models(), time=st.integers(2, 30), cut=st.integers(1, 29), piece=st.integers(1, 20), seed=SEEDS)
@torch.no_grad()
def test_prefill_in_parts_is_one_full_pass(spec: ModelSpec, time: int, cut: int, piece: int, seed: int) -> None:
    """Goes on from a state that came as bytes; within a prefill, `piece` tokens at once."""
    model = build(spec, seed)
    ids, cut = tokens(spec, 2, time, seed), min(cut, time - 1)
    whole = model(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "PREFILL_TOKENS", piece)
        first, state = model.prefill(ids[:, :cut], logits_to_keep=0)
        second, state = model.prefill(ids[:, cut:], moved(state), logits_to_keep=0)
    assert close(torch.cat([first, second], 1), whole)
    assert state.lengths.tolist() == [time, time]


@EXAMPLES
@given(
    spec=any_models(),
    rows=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=4),
    piece=st.integers(1, 40),
    left=st.booleans(),
    keep=st.integers(1, 4),
    seed=SEEDS,
)
@torch.no_grad()
def test_ragged_rows_are_rows_alone(
    spec: ModelSpec, rows: list[tuple[int, int]], piece: int, left: bool, keep: int, seed: int
) -> None:
    """Two ragged prefills and some steps of a batch, padding on either side, against each row in one full pass."""
    model = build(spec, seed)
    all_ids = [tokens(spec, 1, first + second + 3, seed + row) for row, (first, second) in enumerate(rows)]
    expected = [model(ids)[0] for ids in all_ids]
    state = None
    done = [0] * len(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "PREFILL_TOKENS", piece)
        for part in range(2):
            lengths = [pair[part] for pair in rows]
            parts = [ids[0, at : at + n] for ids, at, n in zip(all_ids, done, lengths, strict=True)]
            padded, mask = pad(parts, left)
            logits, state = model.prefill(padded, state, attention_mask=mask, logits_to_keep=keep)
            done = [at + n for at, n in zip(done, lengths, strict=True)]
            for row, (at, n) in enumerate(zip(done, lengths, strict=True)):
                known = min(keep, n)
                assert close(logits[row, logits.shape[1] - known :], expected[row][at - known : at])
    assert state is not None
    assert state.lengths.tolist() == done
    for _ in range(3):
        column = torch.stack([ids[0, at] for ids, at in zip(all_ids, done, strict=True)])
        logits, state = model.decode(column, state)
        assert all(close(logits[row], expected[row][at]) for row, at in enumerate(done))
        done = [at + 1 for at in done]


def pad(parts: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    time = max(len(part) for part in parts)
    ids, mask = torch.zeros(len(parts), time, dtype=torch.int64), torch.zeros(len(parts), time, dtype=torch.int64)
    for row, part in enumerate(parts):
        where = slice(time - len(part), None) if left else slice(0, len(part))
        ids[row, where], mask[row, where] = part, 1
    return ids, mask


@EXAMPLES
@given(spec=any_models(), lengths=st.lists(LENGTHS, min_size=2, max_size=4), left=st.booleans(), seed=SEEDS)
@torch.no_grad()
def test_forward_of_padded_rows_is_forward_of_rows_alone(spec: ModelSpec, lengths: list[int], left: bool, seed: int) -> None:
    model = build(spec, seed)
    rows = [tokens(spec, 1, n, seed + i)[0] for i, n in enumerate(lengths)]
    ids, mask = pad(rows, left)
    for kind in (mask, mask.bool(), mask.float()):
        logits = model(ids, attention_mask=kind)
        assert logits.isfinite().all()
        prefilled, _ = model.prefill(ids, attention_mask=kind, logits_to_keep=0)
        for i, row in enumerate(rows):
            alone = model(row[None])[0]
            assert close(logits[i][mask[i].bool()], alone)
            assert close(prefilled[i][mask[i].bool()], alone)


@EXAMPLES
@given(spec=any_models(), lengths=st.lists(LENGTHS, min_size=2, max_size=4), data=st.data(), seed=SEEDS)
@torch.no_grad()
def test_joined_and_cut_states_decode_as_separate_ones(
    spec: ModelSpec, lengths: list[int], data: st.DataObject, seed: int
) -> None:
    model = build(spec, seed)
    rows = [tokens(spec, 1, n + 4, seed + i) for i, n in enumerate(lengths)]
    expected = [model(ids)[0] for ids in rows]
    states = [model.prefill(ids[:, :n])[1] for ids, n in zip(rows, lengths, strict=True)]
    joined = SequenceState.concat(states)
    assert joined.lengths.tolist() == lengths
    following = torch.stack([ids[0, n:] for ids, n in zip(rows, lengths, strict=True)])
    found = decode_all(model, following[:, :2], joined)
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    chosen = moved(joined.slice(order))
    more = decode_all(model, following[order, 2:], chosen)
    for row, (n, logits) in enumerate(zip(lengths, expected, strict=True)):
        assert close(found[row], logits[n : n + 2])
    for place, row in enumerate(order):
        assert close(more[place], expected[row][lengths[row] + 2 : lengths[row] + 4])
    again = decode_all(model, following[:, 2:], joined)  # a copy was continued, not this
    assert all(close(again[row], expected[row][n + 2 : n + 4]) for row, n in enumerate(lengths))


@torch.no_grad()
def test_copies_share_nothing() -> None:
    model = build(SPEC)
    ids = tokens(SPEC, 2, 9)
    _, state = model.prefill(ids[:, :5])
    before = state.to_bytes()
    copies = [state.clone(), state.slice([0, 1]), SequenceState.concat([state]), state.to("cpu"), moved(state)]
    for copy in copies:
        assert copy.to_bytes() == before
        model.decode(ids[:, 5], copy)
        assert copy.lengths.tolist() == [6, 6]
        assert state.to_bytes() == before


@pytest.mark.parametrize("dtype", DTYPES)
@EXAMPLES
@given(spec=any_models(), lengths=st.lists(st.integers(0, 5), max_size=3), spare=st.integers(0, 3), seed=SEEDS)
def test_bytes_hold_a_state_to_the_bit(dtype: str, spec: ModelSpec, lengths: list[int], spare: int, seed: int) -> None:
    state = filled(spec, lengths, dtype, spare=spare, seed=seed)
    data = state.to_bytes()
    again = SequenceState.from_bytes(data)
    assert again.to_bytes() == data
    assert again.lengths.tolist() == lengths
    assert again.nbytes == state.nbytes
    for m, ours, theirs in zip(spec.layers, again.layers, state.layers, strict=True):
        assert type(ours) is type(theirs)
        if ours is None or theirs is None:
            continue
        for new, old in zip(ours.tensors, theirs.tensors, strict=True):
            assert new.dtype == old.dtype
            for row, length in enumerate(lengths):
                known = slice(0, length) if isinstance(m, Attention) else slice(None)
                assert torch.equal(bits(new[row][:, known]), bits(old[row][:, known]))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def filled(spec: ModelSpec, lengths: list[int], dtype: str, *, spare: int = 0, seed: int = 0) -> SequenceState:
    """Random bits, infinities and not-a-numbers among them."""
    random = torch.Generator().manual_seed(seed)
    room = max(lengths, default=0) + spare
    state = SequenceState.zeros(spec, len(lengths), capacity=room, dtype=DTYPES[dtype])
    for layer in state.layers:
        for tensor in () if layer is None else layer.tensors:
            if tensor.numel():
                raw = tensor.view(torch.uint8)
                raw.copy_(torch.randint(0, 256, raw.shape, generator=random, dtype=torch.uint8))
    state.lengths.copy_(torch.tensor(lengths, dtype=torch.int64))
    return state


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_damaged_byte_is_noticed(dtype: str) -> None:
    data = filled(replace(SPEC, layers=SPEC.layers[:3]), [2, 1], dtype).to_bytes()
    random = torch.Generator().manual_seed(0)
    masks = torch.randint(1, 256, (len(data),), generator=random).tolist()
    for i, mask in enumerate(masks):
        for flipped in {1, 4, 128, mask}:
            damaged = bytearray(data)
            damaged[i] ^= flipped
            refused(bytes(damaged))


@pytest.mark.parametrize("count", [0, 7, 8, 12, 16, 40])
def test_bytes_that_end_early_or_late_are_refused(count: int) -> None:
    data = filled(SPEC, [2, 1], "fp32").to_bytes()
    refused(data[:count])
    refused(data[: len(data) - 1 - count])
    refused(data + b"\0" * (count + 1))


def test_another_version_is_refused_by_name() -> None:
    data = filled(SPEC, [2], "fp32").to_bytes()
    with pytest.raises(SpecError, match=r"^state version=2: this program reads version 1$"):
        SequenceState.from_bytes(data[:8] + struct.pack("<I", 2) + data[12:])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff",
        b'{"lengths": [-1], "layers": []}',
        b'{"lengths": [2], "layers": [{"kind": "AttentionState", "shapes": [[1, 2]], "dtypes": ["fp99"]}]}',
        b'{"lengths": [2], "layers": [{"kind": "AttentionState", "shapes": [[1], [1]], "dtypes": ["fp32", "fp32"]}]}',
        b'{"lengths": [1e12], "layers": []}',
        b'{"lengths": [1], "layers": [7]}',
        b'{"lengths": [1], "layers": [{"kind": "MambaState", "shapes": [[-1], [1]], "dtypes": ["fp32", "fp32"]}]}',
        b'{"lengths": [99999999], "layers": [{"kind": "MambaState", "shapes": [[9999999], [1]], "dtypes": ["fp32", "fp32"]}]}',
    ],
)
def test_a_header_that_says_nothing_is_refused_even_with_its_checksum(header: bytes) -> None:
    body = struct.pack("<I", len(header)) + header
    refused(b"TANDEMSQ" + struct.pack("<II", 1, zlib.crc32(body)) + body)


def refused(data: bytes) -> None:
    with pytest.raises(SpecError) as error:
        SequenceState.from_bytes(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
@EXAMPLES
@given(spec=any_models(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), spare=st.integers(0, 3))
def test_bytes_are_the_formula_of_the_specification(dtype: str, spec: ModelSpec, lengths: list[int], spare: int) -> None:
    state = filled(spec, lengths, dtype, spare=spare)
    one_row = spec.state_bytes_per_sequence(state="fp32", activations=dtype)
    assert state.nbytes == sum(one_row + spec.kv_bytes(n, kv=dtype) for n in lengths)
    assert len(state.to_bytes()) - state.nbytes < 200 + 130 * len(spec.layers)


def test_room_grows_by_doubling() -> None:
    model = build(SPEC)
    ids = tokens(SPEC, 1, 40)
    _, state = model.prefill(ids[:, :3])
    rooms = [(model.decode(ids[:, t], state), state.capacity)[1] for t in range(3, 40)]
    assert sorted(set(rooms)) == [6, 12, 24, 48]


@torch.no_grad()
def test_models_without_attention_or_without_memory_have_states() -> None:
    mamba, mlp = SPEC.layers[0], SPEC.layers[2]
    for layers in ((mamba, mlp), (mlp,), (replace(mamba, conv_kernel=1),)):
        spec = replace(SPEC, layers=layers)
        model, ids = build(spec), tokens(spec, 2, 9)
        _, state = model.prefill(ids[:, :5])
        assert state.capacity is None
        assert close(decode_all(model, ids[:, 5:], moved(state)), model(ids)[:, 5:])


@pytest.mark.parametrize("seen", [(1, 1), (5, 5), (11, 11), (6, 2)])
def test_gradients_of_a_continued_state_are_those_of_differences(seen: tuple[int, int]) -> None:
    """Of tokens that follow a given past, along a random direction of each weight."""
    model, past = build(SPEC), after(SPEC, seen)
    ids = tokens(SPEC, 2, 12 - min(seen))

    def loss() -> Tensor:
        hidden = model.hidden_states(ids, state=past.clone())
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids.flatten())

    loss().backward()
    random = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=random)
        with torch.no_grad():
            p += 5e-4 * direction
            above = loss()
            p -= 1e-3 * direction
            below = loss()
            p += 5e-4 * direction
        measured = ((above - below) / 1e-3).item()
        assert p.grad is not None
        assert (p.grad * direction).sum().item() == pytest.approx(measured, rel=0.02, abs=2e-3), name


def after(spec: ModelSpec, seen: tuple[int, ...]) -> SequenceState:
    """State of rows that have seen so many tokens."""
    mask = (torch.arange(max(seen)) < torch.tensor(seen)[:, None]).long()
    return build(spec).prefill(tokens(spec, len(seen), max(seen), seed=1), attention_mask=mask)[1]


@pytest.mark.parametrize("times", [(4, 3), (1, 1)])
@pytest.mark.parametrize("seen", [(5, 5), (6, 2)])
def test_a_state_keeps_no_gradients_and_can_be_continued_again(seen: tuple[int, int], times: tuple[int, int]) -> None:
    """Each pass has the gradients of its own tokens; what came before is given."""
    model, state = build(SPEC), after(SPEC, seen)
    first, second = tokens(SPEC, 2, times[0]), tokens(SPEC, 2, times[1], seed=2)
    one = model.hidden_states(first, state=state)
    assert not any(t.requires_grad for layer in state.layers if layer is not None for t in layer.tensors)
    between = moved(state)
    two = model.hidden_states(second, state=state)

    def slope(hidden: Tensor) -> Tensor:
        weights = [p for p in model.parameters() if p is not model.lm_head.weight]
        return torch.cat([g.flatten() for g in torch.autograd.grad(hidden.square().sum(), weights)])

    assert torch.equal(slope(one + 0), slope(model.hidden_states(first, state=after(SPEC, seen))))
    assert torch.equal(slope(two), slope(model.hidden_states(second, state=between)))


def test_a_state_of_inference_mode_goes_on_outside_of_it() -> None:
    model, ids = build(SPEC), tokens(SPEC, 2, 9)
    with torch.inference_mode():
        _, state = model.prefill(ids[:, :5])
        mixed = model.prefill(ids[:, 2:5], after(SPEC, (2, 2)))[1]
    again = state.clone()
    assert close(decode_all(model, ids[:, 5:], state), model(ids)[:, 5:])
    assert close(model.prefill(ids[:, 5:], again)[0][:, 0], model(ids)[:, -1])
    assert model.decode(ids[:, 0], mixed)[0].isfinite().all()


def test_states_of_different_models_do_not_join() -> None:
    other = replace(SPEC, layers=SPEC.layers[:2])
    with pytest.raises(SpecError, match="not of one model"):
        SequenceState.concat([filled(SPEC, [1], "fp32"), filled(other, [1], "fp32")])
    with pytest.raises(SpecError, match="not of one model"):
        SequenceState.concat([filled(SPEC, [1], "fp32"), filled(SPEC, [1], "fp16")])
    with pytest.raises(SpecError, match="at least one state"):
        SequenceState.concat([])
    with pytest.raises(SpecError, match="rows holds 2: the state has 2 sequences"):
        filled(SPEC, [1, 1], "fp32").slice([0, 2])
    with pytest.raises(SpecError, match="rows holds True: must be numbers of rows"):
        filled(SPEC, [1, 1], "fp32").slice([True, False])


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (SPEC.layers[:3], "3 layers"),
        ((*SPEC.layers[:3], MLP(ffn_size=16, gated=True)), "state of layer 3"),
        ((SPEC.layers[0], Attention(num_heads=4, num_kv_heads=4, head_dim=6), *SPEC.layers[2:]), "state of layer 1"),
    ],
)
def test_a_state_of_another_model_is_refused(other: tuple[Mixer, ...], word: str) -> None:
    model, ids = build(SPEC), tokens(SPEC, 2, 3)
    wrong = after(replace(SPEC, layers=other), (2, 2))
    before = wrong.to_bytes()
    for call in (model.prefill, model.decode, lambda i, s: model.hidden_states(i, state=s)):
        with pytest.raises(SpecError, match=word):
            call(ids[:, :1], wrong)
        assert wrong.to_bytes() == before
    with pytest.raises(SpecError, match="2 sequences"):
        model.prefill(ids[:1], after(SPEC, (2, 2)))
