"""Linears whose products are of bf16 or FP8 numbers, while weights, gradients and all that lies between stay fp32.

`apply_precision` puts them into a decoder. Names and values of parameters do not change, so checkpoints know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tandem.model.ffn import MoEMixer
from tandem.model.hybrid import Decoder
from tandem.model.linear import Linear
from tandem.model.precision import cpu_has_fast_bf16
from tandem.spec.errors import SpecError
from tandem.train.fp8 import BLOCK, BLOCKWISE, CURRENT_SCALING, E4M3, Fp8Format, Fp8Recipe, quantise, round_trip
from tandem.train.recipe import PrecisionPart

NARROW = 16
"""Sides up to which torch does not ask oneDNN for a product, and so does not heed its number format."""


@contextmanager
def _bf16_multiplication() -> Iterator[None]:
    """Inside, torch multiplies fp32 matrices on the CPU by rounding them to bf16 and adding up in fp32 (AMX, AVX512-BF16).

    The setting is that of the process: fp32 products of other threads in that moment are rounded as well.
    """
    mkldnn: Any = torch.backends.mkldnn  # its types do not know the settings
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def multiply_bf16(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], *, rounded: bool = False) -> Float[Tensor, "m n"]:
    """a b with both rounded to bf16 (to nearest, ties to even), added up and returned in fp32.

    `rounded` says that the numbers are bf16 already. GPUs and CPUs that do it multiply in hardware; elsewhere the
    rounded numbers are multiplied in fp32. Results differ by the order of fp32 additions only, that is by some 1e-7 of the
    sum of magnitudes.
    """
    if a.device.type == "cuda":
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    compiling = torch.compiler.is_compiling()
    if (
        not compiling
        and a.device.type == "cpu"
        and min(*a.shape, b.shape[1]) > NARROW
        and cpu_has_fast_bf16()
        and _mode_rounds()
    ):
        with _bf16_multiplication():
            return a @ b
    return a @ b if rounded else _as_bf16(a) @ _as_bf16(b)


@cache
def _mode_rounds() -> bool:
    """Whether oneDNN's bf16 mode rounds operands here. With AVX512-BF16 and no AMX it multiplies them as they are."""
    a = torch.linspace(1.0, 2.0, 64 * 64).view(64, 64)
    with _bf16_multiplication():
        found = a @ a
    whole, rounded = a.double() @ a.double(), a.bfloat16().double() @ a.bfloat16().double()
    return bool((found - rounded).norm() < (found - whole).norm())


def _as_bf16(x: Tensor) -> Tensor:
    """fp32 numbers rounded to bf16. torch.compile takes a cast and the cast back for nothing, so there it is done on bits."""
    if not torch.compiler.is_compiling():
        return x.bfloat16().float()
    bits = x.view(torch.int32)
    even = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + even) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


class _Bf16Product(torch.autograd.Function):
    """x W^T, g W and g^T x, each by `multiply_bf16`."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "tokens width"], weight: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "tokens rows"]:
        ctx.save_for_backward(x, weight)
        return multiply_bf16(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens rows"]) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return multiply_bf16(grad, weight) if wants_x else None, multiply_bf16(grad.T, x) if wants_weight else None


class _BlockProduct(torch.autograd.Function):
    """x W^T, g W and g^T x of FP8 numbers with a scale a block (`Fp8Linear`)."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "tokens width"], weight: Float[Tensor, "rows width"], recipe: Fp8Recipe
    ) -> Float[Tensor, "tokens rows"]:
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight)
        x, weight = (_rounded(t, block, E4M3, recipe) for t, block in ((x, (1, BLOCK)), (weight, (BLOCK, BLOCK))))
        return _multiply(x, weight.T, recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens rows"]) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        recipe, grad_x, grad_weight = ctx.recipe, None, None
        if ctx.needs_input_grad[0]:
            across = _rounded(grad, (1, BLOCK), recipe.gradients, recipe)
            grad_x = _multiply(across, _rounded(weight, (BLOCK, BLOCK), E4M3, recipe), recipe)
        if ctx.needs_input_grad[1]:
            down = _rounded(grad, (BLOCK, 1), recipe.gradients, recipe)
            grad_weight = _multiply(down.T, _rounded(x, (BLOCK, 1), E4M3, recipe), recipe)
        return grad_x, grad_weight, None


def _rounded(x: Tensor, block: tuple[int, int], form: Fp8Format, recipe: Fp8Recipe) -> Tensor:
    return round_trip(x, block, form, power_of_two=recipe.power_of_two)


def _multiply(a: Tensor, b: Tensor, recipe: Fp8Recipe) -> Tensor:
    """FP8 numbers times powers of two are bf16 numbers; times other scales they have too many digits."""
    return multiply_bf16(a, b, rounded=True) if recipe.power_of_two else a @ b


class _TensorProduct(torch.autograd.Function):
    """The same with a scale a tensor, which is multiplied in after the product; FP8 numbers themselves are bf16 numbers.

    Not in place: selective recompute keeps products as they were.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "tokens width"], weight: Float[Tensor, "rows width"], recipe: Fp8Recipe
    ) -> Float[Tensor, "tokens rows"]:
        (values, scale), (columns, other) = _whole(x, E4M3, recipe), _whole(weight, E4M3, recipe)
        ctx.recipe = recipe
        ctx.save_for_backward(values, scale, weight)
        return multiply_bf16(values, columns.T, rounded=True) * (scale * other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens rows"]) -> tuple[Tensor | None, Tensor | None, None]:
        x, x_scale, weight = ctx.saved_tensors
        values, scale = _whole(grad, ctx.recipe.gradients, ctx.recipe)
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            rows, other = _whole(weight, E4M3, ctx.recipe)
            grad_x = multiply_bf16(values, rows, rounded=True) * (scale * other)
        if ctx.needs_input_grad[1]:
            grad_weight = multiply_bf16(values.T, x, rounded=True) * (scale * x_scale)
        return grad_x, grad_weight, None


def _whole(x: Tensor, form: Fp8Format, recipe: Fp8Recipe) -> tuple[Tensor, Tensor]:
    quantised = quantise(x, None, form, power_of_two=recipe.power_of_two)
    return quantised.values, quantised.scales


class Bf16Linear(Linear):
    """A linear whose forward and backward products are of bf16 numbers, added up in fp32 (`multiply_bf16`).

    fp32 in, fp32 out, fp32 gradients. GPUs that train in bf16 round each result to bf16 as well; here results stay fp32.
    """

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rows"]:
        """x W^T + b, fp32."""
        return _apply(self, x, _Bf16Product)


class Fp8Linear(Linear):
    """A linear whose forward and backward products are of FP8 numbers; weights and gradients are kept in fp32.

    | product | left operand | right operand |
    |---|---|---|
    | y = x W^T | x, tiles along the inputs | W, 128x128 |
    | dx = g W | g, tiles along the outputs | W, the same numbers |
    | dW = g^T x | g, tiles along the tokens | x, tiles along the tokens |

    A tile runs along the axis that is summed over, else its scale could not be taken out of the sum; so x and g are rounded
    twice, each time from fp32, as DeepSeek-V3 and Transformer Engine's `Float8BlockScaling` do. Tokens of all sequences count
    in one row. With a scale a tensor, x, W and g are each rounded once.

    On GPUs of compute capability 9.0 and above the block recipe runs in torchao's kernels, where it is installed and tokens
    and widths are multiples of 128. Everywhere else FP8 numbers are multiplied in a wider format with fp32 addition, which
    gives what a scaled FP8 product gives but for the order of additions; hardware that adds in fewer bits errs more.
    """

    recipe: Fp8Recipe = BLOCKWISE

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rows"]:
        """x W^T + b, fp32."""
        kernel = _hardware_product(x, self.weight) if self.recipe == BLOCKWISE else None
        if kernel is not None:
            y = kernel(x.bfloat16(), self.weight.bfloat16(), BLOCK).to(x.dtype)
            return y if self.bias is None else y + self.bias
        product = _BlockProduct if self.recipe.scaling == "block" else _TensorProduct
        return _apply(self, x, product, self.recipe)

    def extra_repr(self) -> str:
        """As of other linears, with the recipe."""
        return f"{super().extra_repr()}, scaling={self.recipe.scaling}"


def _apply(linear: Linear, x: Tensor, product: type[torch.autograd.Function], *more: Any) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).float()
    y: Tensor = product.apply(flat, linear.weight.float(), *more)
    y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]).to(x.dtype)  # FSDP2 warns of modules that return views
    return y if linear.bias is None else y + linear.bias.to(x.dtype)


def _hardware_product(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """torchao's product, forward and backward, where GPU and sizes allow it."""
    sizes = (x.numel() // max(1, x.shape[-1]), *weight.shape)
    if x.device.type != "cuda" or any(size == 0 or size % BLOCK for size in sizes):
        return None
    return _torchao_product() if torch.cuda.get_device_capability(x.device) >= (9, 0) else None


@cache
def _torchao_product() -> Callable[[Tensor, Tensor, int], Tensor] | None:
    try:
        found = import_module("torchao.prototype.blockwise_fp8_training.linear").fp8_blockwise_mm.apply
    except (ImportError, AttributeError, OSError):
        return None
    return cast(Callable[[Tensor, Tensor, int], Tensor], found)


def apply_precision(model: Decoder, part: PrecisionPart) -> list[str]:
    """Replace the linears of a decoder, in place and with the same parameters, and name those that are FP8 now, in order of
    execution (with "bf16" those that are bf16; with "fp32" none).

    With FP8 the first `keep_first` and the last `keep_last` linears of the layers are bf16, and so is the head. Embedding,
    router, stacked experts, convolution, scan, norms and the core of attention are no `Linear` and stay as they are. Call it
    before `fully_shard` and before an optimiser is made; a second call changes what the first one did.
    """
    names = layer_linears(model)
    if part.linears == "fp32":
        _replace(model, [*names, "lm_head"], Linear)
        return []
    _replace(model, [*names, "lm_head"], Bf16Linear)
    if part.linears == "bf16":
        return [*names, "lm_head"]
    chosen = names[part.keep_first : max(part.keep_first, len(names) - part.keep_last)]
    for linear in _replace(model, chosen, Fp8Linear):
        linear.recipe = BLOCKWISE if part.linears == "fp8-block" else CURRENT_SCALING
    return chosen


def layer_linears(model: Decoder) -> list[str]:
    """Names of the linears of all layers in order of execution."""
    names = []
    for i, layer in enumerate(model.backbone.layers):
        inside = [name for name, module in layer.named_modules() if isinstance(module, Linear)]
        if isinstance(layer.mixer, MoEMixer):  # the shared expert comes after the routed ones
            inside.sort(key=lambda name: "shared_experts" in name)
        names += [f"backbone.layers.{i}.{name}" for name in inside]
    return names


LinearKind = TypeVar("LinearKind", bound=Linear)


def _replace(model: Decoder, names: list[str], kind: type[LinearKind]) -> list[LinearKind]:
    """Put linears of a kind into the places of others, with their parameters and mode."""
    made = []
    for name in names:
        parent, _, last = name.rpartition(".")
        old = model.get_submodule(name)
        if not isinstance(old, Linear):
            raise SpecError(f"{name}={type(old).__name__}: must be a linear of the decoder")
        with torch.device("meta"):
            new = kind(old.in_features, old.out_features, bias=old.bias is not None)
        new.weight, new.bias = old.weight, old.bias
        setattr(model.get_submodule(parent), last, new.train(old.training))
        made.append(new)
    return made
