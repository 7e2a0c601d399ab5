"""What the CUDA kernels of mamba_ssm and causal_conv1d are called with, by stand-ins that have their documented signatures.

The stand-ins check layouts as those packages do and compute by our own torch code, so what comes back must be right too.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tandem.model import kernels
from tandem.model.scan import causal_conv, ssd_scan, ssd_step

BATCH, TIME, HEADS, SIZE, GROUPS, STATE, CHUNK = 2, 21, 6, 3, 2, 5, 8
CHANNELS, KERNEL = 16, 4


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """mamba_ssm 2.2: x [b, t, h, p], dt [b, t, h], A [h], B and C [b, t, g, n], initial_states [b, h, p, n], seq_idx [b, t]."""
    assert x.shape == (BATCH, TIME, HEADS, SIZE)
    assert dt.shape == (BATCH, TIME, HEADS)
    assert A.shape == (HEADS,)
    assert B.shape == C.shape == (BATCH, TIME, GROUPS, STATE)
    assert chunk_size == CHUNK
    assert initial_states is None or initial_states.shape == (BATCH, HEADS, SIZE, STATE)
    assert seq_idx is None or (seq_idx.shape == (BATCH, TIME) and seq_idx.dtype == torch.int32)
    assert (D, z, dt_bias, cu_seqlens, dt_softplus, dt_limit) == (None, None, None, None, False, (0.0, float("inf")))
    assert return_final_states
    assert not return_varlen_states
    return ssd_scan(*plain(x, dt, A, B, C), chunk=4, state=initial_states, segments=seq_idx)


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """mamba_ssm 2.2: state [b, h, p, n] is written over; x, dt [b, h, p], A [h, p, n], B and C [b, g, n], dt_bias [h, p].

    Where heads share a rate (strides 0) it reads the strides of the bias without asking whether there is one.
    """
    assert state.shape == (BATCH, HEADS, SIZE, STATE)
    assert x.shape == dt.shape == (BATCH, HEADS, SIZE)
    assert A.shape == (HEADS, SIZE, STATE)
    assert B.shape == C.shape == (BATCH, GROUPS, STATE)
    assert dt_bias.shape == (HEADS, SIZE)
    assert A.stride(-1) == A.stride(-2) == dt.stride(-1) == dt_bias.stride(-1) == 0
    assert (D, z, dt_softplus, state_batch_indices) == (None, None, False, None)
    y, new = ssd_step(state, x, dt[..., 0] + dt_bias[:, 0], A[:, 0, 0], B, C)
    state.copy_(new)
    return y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):  # fmt: skip
    """causal_conv1d 1.4: x [b, d, t], weight [d, k], bias [d], seq_idx [b, t] or initial_states [b, d, k - 1], not both.

    Here the channels of x are next to each other in memory (they must be beside seq_idx or initial states, whose channels are
    as well); then their number and the strides of x must be multiples of 8. Kernels are 2 to 4 wide.
    """
    assert x.shape == (BATCH, CHANNELS, TIME)
    assert x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert x.dtype == weight.dtype
    assert bias is None or bias.dtype == x.dtype
    assert weight.shape == (CHANNELS, KERNEL)
    assert x.stride(1) == 1
    if seq_idx is not None:
        assert initial_states is None
        assert seq_idx.shape == (BATCH, TIME)
        assert seq_idx.dtype == torch.int32
    if initial_states is not None:
        assert initial_states.shape == (BATCH, CHANNELS, KERNEL - 1)
        assert initial_states.stride(1) == 1
        assert initial_states.dtype == x.dtype
    assert (return_final_states, final_states_out, activation) == (False, None, None)
    return causal_conv(x.transpose(1, 2), weight, bias, window=initial_states, segments=seq_idx).transpose(1, 2)


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; so is what is computed from it."""

    device = SimpleNamespace(type="cuda")


def on_gpu(*shape: int, seed: int = 0) -> OnGpu:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).as_subclass(OnGpu)


def plain(*tensors: Tensor) -> list[Tensor]:
    return [tensor.as_subclass(Tensor) for tensor in tensors]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages, as far as they are used; the names that were asked for."""
    asked: list[str] = []
    there = {
        "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
        "mamba_ssm.ops.triton.selective_state_update": selective_state_update,
        "causal_conv1d": causal_conv1d_fn,
    }

    def found(module: str, name: str) -> object:
        assert there[module].__name__ == name
        asked.append(name)
        return there[module]

    monkeypatch.setattr(kernels, "_installed", found)
    return asked


def close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).abs().max().item() < 1e-5


@pytest.mark.parametrize("beside", ["", "state", "segments"])
def test_the_scan_of_mamba_ssm_is_called_as_documented(beside: str, installed: list[str]) -> None:
    x, a = on_gpu(BATCH, TIME, HEADS, SIZE), -on_gpu(HEADS).exp()
    dt = on_gpu(BATCH, TIME, HEADS, seed=1).exp()
    b_in, c_out = (on_gpu(BATCH, TIME, GROUPS, STATE, seed=s) for s in (2, 3))
    state = on_gpu(BATCH, HEADS, SIZE, STATE, seed=4) if beside == "state" else None
    segments = (torch.arange(TIME) // 6).expand(BATCH, -1) if beside == "segments" else None
    y, final = kernels.scan(x, dt, a, b_in, c_out, chunk=CHUNK, state=state, segments=segments)
    wanted = ssd_scan(*plain(x, dt, a, b_in, c_out), chunk=CHUNK, state=state, segments=segments)
    assert close(y, wanted[0])
    assert close(final, wanted[1])
    assert installed == ["mamba_chunk_scan_combined"]


def test_the_step_of_mamba_ssm_is_called_as_documented_and_the_state_stays(installed: list[str]) -> None:
    state, x, a = on_gpu(BATCH, HEADS, SIZE, STATE), on_gpu(BATCH, HEADS, SIZE, seed=1), -on_gpu(HEADS).exp()
    dt = on_gpu(BATCH, HEADS, seed=2).exp()
    b_in, c_out = (on_gpu(BATCH, GROUPS, STATE, seed=s) for s in (3, 4))
    before = state.clone()
    y, new = kernels.scan_step(state, x, dt, a, b_in, c_out)
    assert torch.equal(state, before)
    wanted = ssd_step(state, x, dt, a, b_in, c_out)
    assert close(y, wanted[0])
    assert close(new, wanted[1])
    assert installed == ["selective_state_update"]


@pytest.mark.parametrize("beside", ["", "window", "segments"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "kernel", "row"), [(16, 4, 32), (16, 4, 37), (12, 4, 32), (16, 5, 32)])
def test_the_convolution_of_causal_conv1d_is_called_as_documented_where_it_can_be(
    beside: str, bias: bool, dtype: torch.dtype, channels: int, kernel: int, row: int, monkeypatch: pytest.MonkeyPatch,
    installed: list[str],
) -> None:  # fmt: skip
    """x is a slice of the projection, as in the mixer; parameters are fp32 under autocast, windows as the state has them."""
    monkeypatch.setattr(kernels, "_compiled", lambda function: function)
    x = on_gpu(BATCH, TIME, row).to(dtype)[..., 8 : 8 + channels]
    weight, added = on_gpu(channels, kernel, seed=1), on_gpu(channels, seed=2) if bias else None
    window = on_gpu(BATCH, channels, kernel - 1, seed=3) if beside == "window" else None
    segments = (torch.arange(TIME) // 6).expand(BATCH, -1) if beside == "segments" else None
    y = kernels.convolve(x, weight, added, window=window, segments=segments)
    assert y.dtype == dtype
    assert close(y, causal_conv(x, weight, added, window=window, segments=segments))
    assert installed == (["causal_conv1d_fn"] if (channels, kernel) == (CHANNELS, KERNEL) else [])
