"""Compression candidates times traffic: the best deployment of every shape that paper A's search looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from tandem.compress.objective import FixedBatch, Prediction
from tandem.compress.recipe_files import load_recipe
from tandem.compress.shape import Shape, pruned_spec, total_bytes
from tandem.compress.space import kept_layers
from tandem.perf.costs import Layout
from tandem.perf.memory import ModelMemory
from tandem.plan.planner import Plan, find_plan
from tandem.spec.catalog import load_spec
from tandem.spec.design import Precision
from tandem.spec.errors import NoPlanError
from tandem.spec.model import Attention, ModelSpec
from tandem.spec.workload import Slo, Workload

RECIPE = "12b-to-9b"
HARDWARE, GPUS = "h100-sxm", 16
DEPTHS = (62, 56)
TRAFFIC = ((8192, 1024), (4096, 512), (1024, 4096))
"""Prompt and output tokens: mostly prefill, both, mostly decode."""
TPOTS_S = (0.01, 0.02, 0.05)
TTFT_S = 4.0
CONTEXT = 131_072
CHOSEN = (56, 4480, 15_680, 128)
"""Layers, hidden size, FFN size and Mamba heads of the 9B."""
WHOLE = (62, 5120, 20_480, 128)
"""Those of the 12B."""
ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)

Key = tuple[int, int, int, int]
Cell = tuple[int, int, float]
"""Prompt tokens, output tokens, bound on the time per output token."""


def cell_text(cell: Cell) -> str:
    """`8192/1024 at 20 ms`."""
    return f"{cell[0]}/{cell[1]} at {cell[2] * 1e3:.0f} ms"


@dataclass(frozen=True)
class Candidate:
    """A shape, what it holds, and what its best deployment does in each cell; None where none meets the bounds."""

    key: Key
    spec: ModelSpec
    fixed_batch: float | None
    """Output tokens/s on one A10G at the paper's lengths and batch; None where not one sequence fits."""
    plans: Mapping[Cell, Plan | None]

    @cached_property
    def total_bytes(self) -> int:
        """Weights, cache and state of one sequence of 128k tokens."""
        return total_bytes(self.spec, context=CONTEXT)

    @cached_property
    def state_bytes(self) -> float:
        """Recurrent state of a sequence, which every transfer moves."""
        return float(ModelMemory(self.spec, Precision()).sequence_bytes(ONE, 0.0))

    @property
    def attention_layers(self) -> int:
        """Whose cache grows with the prompt."""
        return sum(isinstance(layer, Attention) for layer in self.spec.layers)

    def per_gpu(self, cell: Cell) -> float | None:
        """Output tokens/s of a GPU in the best deployment."""
        plan = self.plans[cell]
        return None if plan is None else plan.best.tokens_per_s / plan.best.deployment.gpus

    def gain(self, cell: Cell) -> float | None:
        """Best split deployment over the best shared one; None where one of them does not meet the bounds."""
        plan = self.plans[cell]
        return None if plan is None else plan.gain


def cells() -> tuple[Cell, ...]:
    """All traffic under all bounds."""
    return tuple((isl, osl, tpot_s) for (isl, osl), tpot_s in product(TRAFFIC, TPOTS_S))


def candidates(progress: Callable[[str], None] = lambda _: None) -> dict[Key, Candidate]:
    """Every shape of the recipe's widths at the depths of DEPTHS that is no larger than the 12B, the 12B itself included."""
    recipe = load_recipe(RECIPE)
    assert recipe.depth is not None
    assert recipe.width is not None
    teacher = load_spec(recipe.teacher)
    alone = FixedBatch(hardware="a10g", batch=8, isl=8192, osl=16_384).predictor()
    found: dict[Key, Candidate] = {}
    for depth in DEPTHS:
        layers = None if depth == len(teacher.layers) else kept_layers(teacher, depth, recipe.depth)
        for shape in recipe.width.shapes(teacher, layers):
            key = _key(depth, shape)
            progress(" x ".join(map(str, key)))
            spec = pruned_spec(
                teacher, shape, name=f"{depth} layers, {shape.hidden_size}, {shape.ffn_size}, {shape.mamba_heads}"
            )
            one = alone(spec)
            found[key] = Candidate(
                key=key,
                spec=spec,
                fixed_batch=one.tokens_per_s.value if isinstance(one, Prediction) else None,
                plans={cell: plan_of(spec, cell) for cell in cells()},
            )
    return found


def _key(depth: int, shape: Shape) -> Key:
    return depth, shape.hidden_size or 0, shape.ffn_size or 0, shape.mamba_heads or 0


def plan_of(spec: ModelSpec, cell: Cell) -> Plan | None:
    """The best deployment of a model in a cell."""
    isl, osl, tpot_s = cell
    try:
        return find_plan(
            model=spec, hardware=HARDWARE, gpus=GPUS, workload=Workload.fixed(isl, osl), slo=Slo(ttft_s=TTFT_S, tpot_s=tpot_s)
        )
    except NoPlanError:
        return None
