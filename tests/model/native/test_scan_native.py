"""The C code of training and prefill against the torch code that is its reference, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tandem.model import kernels
from tandem.model.native.build import available
from tandem.model.native.norms import rms_norm, squared_relu
from tandem.model.native.scan import mix
from tandem.model.native.tasks import usable
from tandem.model.scan import causal_conv, ssd_scan
from tandem.spec.model import Mamba2

pytestmark = pytest.mark.skipif(available() is not True, reason="no C compiler")

NAMES = ("projected", "conv_weight", "conv_bias", "dt_bias", "a_log", "skip", "norm_weight", "window", "state")
EPS = 1e-5


def reference(
    tensors: dict[str, Tensor | None], m: Mamba2, segments: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mamba2Mixer's torch code between the projections."""
    t: Any = tensors
    z, inputs, dt = t["projected"].split([m.d_inner, m.conv_width, m.num_heads], -1)
    step = functional.softplus(dt + t["dt_bias"])
    if m.dt_min > 0 or m.dt_max is not None:
        step = step.clamp(m.dt_min, m.dt_max)
    if lengths is not None:
        step = step * counted(lengths, step.shape[1])
    mixed = functional.silu(causal_conv(inputs, t["conv_weight"], t["conv_bias"], window=t["window"], segments=segments))
    x, b_in, c_out = mixed.split([m.d_inner, m.groups * m.state_dim, m.groups * m.state_dim], -1)
    x = x.unflatten(-1, (m.num_heads, m.head_dim))
    b_in, c_out = (v.unflatten(-1, (m.groups, m.state_dim)) for v in (b_in, c_out))
    y, final = ssd_scan(x, step, -t["a_log"].exp(), b_in, c_out, chunk=32, state=t["state"], segments=segments)
    gated = ((y + x * t["skip"][:, None]).flatten(-2) * functional.silu(z)).unflatten(-1, (m.groups, -1))
    return t["norm_weight"] * functional.rms_norm(gated, gated.shape[-1:], None, EPS).flatten(-2), final


def ours(
    tensors: dict[str, Tensor | None], m: Mamba2, segments: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    t: Any = tensors
    weights = [t[name] for name in NAMES[:7]]
    return mix(*weights, m=m, eps=EPS, window=t["window"], state=t["state"], segments=segments, lengths=lengths)


def counted(lengths: Tensor, time: int) -> Tensor:
    return (torch.arange(time) < lengths[:, None])[..., None]


@st.composite
def mixers(draw: st.DrawFn) -> Mamba2:
    groups = draw(st.integers(1, 3))
    clamp = draw(st.sampled_from([(0.0, None), (0.3, 1.5), (0.0, 0.7)]))
    return Mamba2(
        num_heads=groups * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 20)),
        state_dim=draw(st.integers(1, 20)),
        groups=groups,
        conv_kernel=draw(st.integers(1, 6)),
        conv_bias=draw(st.booleans()),
        dt_min=clamp[0],
        dt_max=clamp[1],
    )


CASES = st.fixed_dictionaries(
    {
        "m": mixers(),
        "batch": st.integers(1, 3),
        "time": st.one_of(st.integers(1, 20), st.integers(60, 135)),
        "started": st.booleans(),
        "packed": st.booleans(),
        "padded": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def draw_tensors(case: dict[str, Any]) -> tuple[dict[str, Tensor | None], Tensor | None, Tensor | None]:
    """Inputs by name, segments, lengths; decays of a step from nearly 1 to nearly 0."""
    m, batch, time = case["m"], case["batch"], case["time"]
    random = torch.Generator().manual_seed(case["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    tensors: dict[str, Tensor | None] = {
        "projected": normal(batch, time, m.in_width),
        "conv_weight": normal(m.conv_width, m.conv_kernel) / 2,
        "conv_bias": normal(m.conv_width) / 3 if m.conv_bias else None,
        "dt_bias": 2 * normal(m.num_heads) - 1,
        "a_log": normal(m.num_heads),
        "skip": normal(m.num_heads),
        "norm_weight": 1 + normal(m.d_inner) / 5,
        "window": normal(batch, m.conv_width, m.conv_kernel - 1) if case["started"] else None,
        "state": normal(batch, m.num_heads, m.head_dim, m.state_dim) if case["started"] else None,
    }
    lengths = torch.randint(0, time + 1, (batch,), generator=random) if case["padded"] else None
    segments = None
    if case["packed"]:
        begins = torch.rand(batch, time, generator=random) < 0.08
        begins[:, 0] = False
        segments = (begins if lengths is None else begins & counted(lengths, time)[..., 0]).long().cumsum(1)
    return tensors, segments, lengths


def results(function: Any, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and gradients of a random weighting of them."""
    tensors, segments, lengths = draw_tensors(case)
    leaves = {k: None if v is None else v.to(dtype).requires_grad_() for k, v in tensors.items()}
    out, final = function(leaves, case["m"], segments, lengths)
    random = torch.Generator().manual_seed(case["seed"] + 1)
    weights = [torch.randn(v.shape, generator=random).to(dtype) for v in (out, final)]
    if lengths is not None:
        out, weights[0] = (v * counted(lengths, v.shape[1]) for v in (out, weights[0]))
    ((out * weights[0]).sum() + (final * weights[1]).sum()).backward()
    grads = {k: v.grad for k, v in leaves.items() if v is not None and v.grad is not None}
    return {"out": out.detach(), "final": final.detach()} | grads


@settings(deadline=None, max_examples=40)
@given(case=CASES)
def test_outputs_and_gradients_are_those_of_the_torch_code(case: dict[str, Any]) -> None:
    """To these shares of the largest number of each tensor (or 1). fp32 torch is as far from float64: norms of small groups
    amplify, and the gradients of decays are small differences of large sums over tokens."""
    found, exact = results(ours, case, torch.float32), results(reference, case, torch.float64)
    for name, theirs in exact.items():
        if theirs.numel():
            share = {"out": 5e-5, "final": 5e-6, "dt_bias": 1e-3, "a_log": 1e-3}.get(name, 2e-4)
            apart = (found[name].double() - theirs).abs().max().item()
            assert apart <= share * max(1.0, theirs.abs().max().item()), name


@settings(deadline=None, max_examples=15)
@given(case=CASES, threads=st.integers(2, 5))
def test_threads_and_earlier_calls_change_no_bit(case: dict[str, Any], threads: int) -> None:
    """The scratch of an earlier call with NaNs must not be seen."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(ours, case, torch.float32)
        torch.set_num_threads(threads)
        tensors, segments, lengths = draw_tensors(case)
        spoilt = {k: None if v is None else v * torch.nan for k, v in tensors.items()}
        ours(spoilt, case["m"], segments, lengths)
        together = results(ours, case, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


@settings(deadline=None, max_examples=15)
@given(case=CASES)
def test_without_gradients_the_result_is_the_same(case: dict[str, Any]) -> None:
    tensors, segments, lengths = draw_tensors(case)
    with torch.no_grad():
        plain = ours(tensors, case["m"], segments, lengths)
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in tensors.items()}
    kept = ours(leaves, case["m"], segments, lengths)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 150), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_norm_and_squared_relu_are_those_of_torch(rows: int, size: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=random, requires_grad=True)
    weight = torch.rand(size, generator=random, requires_grad=True)
    grad = torch.randn(rows, size, generator=random)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = functional.rms_norm(wide, (size,), wide_weight, EPS)
    found = rms_norm(x, weight, EPS)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(found, (x, weight), grad)
    for ours_, theirs in zip(grads, torch.autograd.grad(exact, (wide, wide_weight), grad.double()), strict=True):
        torch.testing.assert_close(ours_.double(), theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(squared_relu(x), functional.relu(x).square())
    (slope,) = torch.autograd.grad(squared_relu(x), x, grad)
    torch.testing.assert_close(slope, 2 * functional.relu(x.detach()) * grad, rtol=1e-6, atol=0)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad((x * squared_relu(x)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_torch_code_runs_where_tensors_are_no_plain_fp32() -> None:
    x = torch.randn(2, 4)
    assert usable(x)
    assert not usable(x.double())
    assert not usable(x.to("meta"))
    assert torch.func.vmap(kernels.squared_relu)(x).shape == x.shape
    exact = torch.func.grad(lambda v: kernels.squared_relu(v).sum())(x)
    torch.testing.assert_close(exact, 2 * functional.relu(x))
