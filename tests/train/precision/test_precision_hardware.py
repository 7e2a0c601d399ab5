"""The way to torchao's kernels: when it is taken and what is handed over; on a GPU that has them, what comes back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.train import precision
from tandem.train.fp8 import BLOCKWISE, CURRENT_SCALING
from tandem.train.precision import Fp8Linear

MODULE = "torchao.prototype.blockwise_fp8_training.linear"
Product = Callable[[Tensor, Tensor, int], Tensor]


class FakeProduct(torch.autograd.Function):
    """Takes and gives what torchao's does: bf16 matrices, as `apply(x, weight, block_size)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, block_size: int) -> Tensor:
        assert x.dtype == weight.dtype == torch.bfloat16
        assert block_size == 128
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2), None


class FakeGpu:
    """A tensor's place and size are all that is asked for."""

    def __init__(self, *shape: int, device: str = "cuda") -> None:
        self.shape, self.device = shape, torch.device(device)

    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = MODULE.split(".")
    for i in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:i]), ModuleType(names[i - 1]))
    sys.modules[MODULE].fp8_blockwise_mm = FakeProduct  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    precision._torchao_product.cache_clear()
    yield
    precision._torchao_product.cache_clear()


def product(x: Any, weight: Any) -> Product | None:
    return precision._hardware_product(x, weight)


def test_taken_where_sizes_divide(torchao: None) -> None:
    assert product(FakeGpu(2, 64, 256), FakeGpu(128, 256)) == FakeProduct.apply
    assert product(FakeGpu(2, 65, 256), FakeGpu(128, 256)) is None
    assert product(FakeGpu(128, 200), FakeGpu(128, 200)) is None
    assert product(FakeGpu(128, 256), FakeGpu(130, 256)) is None
    assert product(FakeGpu(0, 256), FakeGpu(128, 256)) is None
    assert product(FakeGpu(128, 256, device="cpu"), FakeGpu(128, 256)) is None


def test_not_taken_on_older_gpus(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert product(FakeGpu(128, 256), FakeGpu(128, 256)) is None


def test_not_taken_without_torchao(torchao: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # what import_module meets where a package is missing
    assert product(FakeGpu(128, 256), FakeGpu(128, 256)) is None


@pytest.mark.parametrize("bias", [False, True])
def test_weights_and_gradients_stay_fp32(torchao: None, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(precision, "_hardware_product", lambda x, weight: precision._torchao_product())
    layer = Fp8Linear(256, 128, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, 64, 128)
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float32
    exact = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    assert float((y.detach() - exact).norm() / exact.norm()) < 0.01
    layer.recipe = CURRENT_SCALING  # is not what that kernel computes
    assert not torch.equal(layer(x), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_as_emulated() -> None:
    """torchao's product (without it ours) is that of the CPU but for rounding to bf16 of what goes in and comes out."""
    layer, x = Fp8Linear(256, 384, bias=False), torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    assert layer.recipe == BLOCKWISE
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        layer.weight.grad = None
        on = x.to(device).requires_grad_()
        y = layer(on)
        y.square().mean().backward()
        results.append([t.detach().cpu() for t in (y, on.grad, layer.weight.grad)])
    for emulated, found in zip(*results, strict=True):
        assert float((emulated - found).norm() / emulated.norm()) < 0.02
