"""The chunked scan, the single step and the convolution against loops over tokens that are written here, in float64.

The loops follow the definition (paper A, section 1.2): nothing of them is shared with the code under test.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.model.scan import causal_conv, ssd_scan, ssd_step

SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "time": st.integers(0, 33),
        "groups": st.integers(1, 4),
        "ratio": st.integers(1, 3),
        "head_dim": st.integers(1, 5),
        "state_dim": st.integers(1, 5),
        "seed": st.integers(0, 2**31),
        "started": st.booleans(),
        "cuts": st.none() | st.lists(st.integers(1, 32), max_size=12),
    }
)
CHUNKS = st.integers(1, 40)


def loop(
    x: Tensor, dt: Tensor, a: Tensor, b_in: Tensor, c_out: Tensor, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One head, one token at a time."""
    batch, time, heads, head_dim = x.shape
    ratio = heads // b_in.shape[2]
    outputs, finals = [], []
    for b in range(batch):
        for h in range(heads):
            s = x.new_zeros(head_dim, b_in.shape[3]) if state is None else state[b, h]
            for t in range(time):
                if segments is not None and t > 0 and segments[b, t] != segments[b, t - 1]:
                    s = torch.zeros_like(s)
                g = h // ratio
                s = torch.exp(dt[b, t, h] * a[h]) * s + dt[b, t, h] * torch.outer(x[b, t, h], b_in[b, t, g])
                outputs.append(s @ c_out[b, t, g])
            finals.append(s)
    y = torch.stack(outputs).view(batch, heads, time, head_dim).transpose(1, 2) if outputs else x
    return y, torch.stack(finals).view(batch, heads, head_dim, -1)


def draw(sizes: dict) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """Inputs in float64: steps from 1e-4 to 30 and rates from 1e-3 to 30, as trained models have and beyond."""
    random = torch.Generator().manual_seed(sizes["seed"])
    batch, time, groups = sizes["batch"], sizes["time"], sizes["groups"]
    heads = groups * sizes["ratio"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def spread(low: float, high: float, *shape: int) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(*shape, generator=random, dtype=torch.float64))

    inputs = {
        "x": normal(batch, time, heads, sizes["head_dim"]),
        "dt": spread(-4, 1.5, batch, time, heads),
        "a": -spread(-3, 1.5, heads),
        "b_in": normal(batch, time, groups, sizes["state_dim"]),
        "c_out": normal(batch, time, groups, sizes["state_dim"]),
    }
    state = normal(batch, heads, sizes["head_dim"], sizes["state_dim"]) if sizes["started"] else None
    return inputs, state, segments_of(sizes["cuts"], batch, time)


def segments_of(cuts: list[int] | None, batch: int, time: int) -> Tensor | None:
    """Each row cut at other places: row b at `cuts` shifted by b."""
    if cuts is None:
        return None
    rows = [[sum(1 for cut in set(cuts) if cut + b <= t) for t in range(time)] for b in range(batch)]
    return torch.tensor(rows, dtype=torch.int64).view(batch, time)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, chunk=CHUNKS)
def test_scan_is_the_loop_over_tokens(sizes: dict, chunk: int) -> None:
    inputs, state, segments = draw(sizes)
    expected = loop(**inputs, state=state, segments=segments)
    found = ssd_scan(**inputs, chunk=chunk, state=state, segments=segments)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, chunk=CHUNKS)
def test_scan_in_fp32_is_close_to_the_loop_in_float64(sizes: dict, chunk: int) -> None:
    """Also where a large step (decay e^-900) and small ones share a chunk."""
    inputs, state, segments = draw(sizes)
    narrow = {name: value.float() for name, value in inputs.items()}
    start = None if state is None else state.float()
    exact = {name: value.double() for name, value in narrow.items()}
    expected = loop(**exact, state=None if start is None else start.double(), segments=segments)
    found = ssd_scan(**narrow, chunk=chunk, state=start, segments=segments)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.numel():
            assert (ours.double() - theirs).abs().max().item() <= 1e-5 * (1 + theirs.abs().max().item())


@settings(deadline=None, max_examples=15)
@given(sizes=SIZES, chunk=st.integers(1, 12))
def test_gradients_of_the_scan_are_those_of_the_loop(sizes: dict, chunk: int) -> None:
    sizes = sizes | {"time": 1 + sizes["time"] % 12}
    inputs, state, segments = draw(sizes)
    values = {**inputs, **({} if state is None else {"state": state})}
    random = torch.Generator().manual_seed(sizes["seed"])
    weights: list[Tensor] = []

    def gradients(function) -> tuple[Tensor, ...]:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        outputs = function(**{"state": None, **leaves, "segments": segments})
        if not weights:
            weights.extend(torch.randn(o.shape, generator=random, dtype=o.dtype) for o in outputs)
        total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)

    expected = gradients(loop)
    found = gradients(lambda **k: ssd_scan(**k, chunk=chunk))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES)
def test_step_is_the_scan_of_one_token(sizes: dict) -> None:
    inputs, state, _ = draw(sizes | {"time": 1, "started": True})
    a = inputs.pop("a")
    y, final = ssd_scan(**inputs, a=a, chunk=4, state=state)
    stepped, new = ssd_step(state, **{name: value[:, 0] for name, value in inputs.items()}, a=a)
    torch.testing.assert_close(stepped, y[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new, final, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, chunk=CHUNKS, cut=st.integers(0, 33))
def test_scan_in_two_parts_is_one_scan(sizes: dict, chunk: int, cut: int) -> None:
    inputs, state, segments = draw(sizes)
    cut = min(cut, sizes["time"])
    if segments is not None and 0 < cut < sizes["time"] and (segments[:, cut] != segments[:, cut - 1]).any():
        segments = None  # the second part continues the first
    a = inputs.pop("a")
    first = {name: value[:, :cut] for name, value in inputs.items()}
    second = {name: value[:, cut:] for name, value in inputs.items()}
    parts = (None, None) if segments is None else (segments[:, :cut], segments[:, cut:])
    y1, middle = ssd_scan(**first, a=a, chunk=chunk, state=state, segments=parts[0])
    y2, final = ssd_scan(**second, a=a, chunk=chunk, state=middle, segments=parts[1])
    y, whole = ssd_scan(**inputs, a=a, chunk=chunk, state=state, segments=segments)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, whole, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(sizes=SIZES, chunk=CHUNKS)
def test_a_token_without_a_step_changes_no_state(sizes: dict, chunk: int) -> None:
    """What padding relies on."""
    inputs, state, _ = draw(sizes | {"cuts": None, "started": True})
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    _, final = ssd_scan(**inputs, chunk=chunk, state=state)
    assert torch.equal(final, state)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, kernel=st.integers(1, 6), bias=st.booleans())
def test_convolution_is_the_loop_over_tokens(sizes: dict, kernel: int, bias: bool) -> None:
    random = torch.Generator().manual_seed(sizes["seed"])
    batch, time, channels = sizes["batch"], 1 + sizes["time"], sizes["head_dim"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x, weight, shift = normal(batch, time, channels), normal(channels, kernel), normal(channels) if bias else None
    window = normal(batch, channels, kernel - 1) if sizes["started"] else None
    segments = segments_of(sizes["cuts"], batch, time)
    expected = torch.zeros_like(x)
    for b in range(batch):
        for t in range(time):
            for back in range(kernel):
                at = t - back
                if segments is not None and segments[b, max(at, 0)] != segments[b, t]:
                    continue
                if at >= 0:
                    expected[b, t] += weight[:, -1 - back] * x[b, at]
                elif window is not None:
                    expected[b, t] += weight[:, -1 - back] * window[b, :, kernel - 1 + at]
    expected = expected if shift is None else expected + shift
    found = causal_conv(x, weight, shift, window=window, segments=segments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_a_forgotten_past_does_not_blur_what_follows(chunk: int) -> None:
    """One step of e^-1000 at the start of a chunk: later decays are differences of sums that hold it, to 1e-5 all the same."""
    inputs, _, _ = draw({"batch": 1, "time": chunk, "groups": 1, "ratio": 2, "head_dim": 4, "state_dim": 8, "seed": 0,
                         "started": False, "cuts": None})  # fmt: skip
    narrow = {name: value.float() for name, value in inputs.items()}
    narrow["a"] = torch.full_like(narrow["a"], -10.0)
    narrow["dt"] = torch.full_like(narrow["dt"], 1e-3)
    narrow["dt"][:, ::7] = 100.0
    y, _ = ssd_scan(**narrow, chunk=chunk)
    expected, _ = loop(**{name: value.double() for name, value in narrow.items()}, state=None, segments=None)
    assert (y.double() - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()
