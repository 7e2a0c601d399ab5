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
from tandem.perf.efficiency import ROOFLINE
from tandem.perf.memory import ModelMemory
from tandem.plan.option import Option
from tandem.plan.planner import Plan, find_plan
from tandem.spec.catalog import load_hardware, load_spec
from tandem.spec.design import Mode, Precision
from tandem.spec.errors import NoPlanError, SpecError
from tandem.spec.model import Attention, ModelSpec
from tandem.spec.units import require_int, require_number
from tandem.spec.workload import Slo, Workload

RECIPE = "12b-to-9b"
DEPTHS = (62, 56)
TRAFFIC = ((8192, 1024), (4096, 512), (1024, 4096))
"""Prompt and output tokens: mostly prefill, both, mostly decode."""
TPOTS_S = (0.01, 0.02, 0.05)
CONTEXT = 131_072
CHOSEN = (56, 4480, 15_680, 128)
"""Layers, hidden size, FFN size and Mamba heads of the 9B."""
WHOLE = (62, 5120, 20_480, 128)
"""Those of the 12B."""
LARGE, SMALL = "nvidia/NVIDIA-Nemotron-Nano-12B-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
"""The same two as the catalogue names them."""
TRANSFORMER, ANOTHER = "Qwen/Qwen3-8B", "meta-llama/Meta-Llama-3.1-8B"
"""Transformers of about the 9B's size: the one that it is set beside, and one that says whether that was chance."""
ONE = Layout(1.0, 1.0, 1.0, 1.0, 1.0)

Key = tuple[int, int, int, int]
Cell = tuple[int, int, float]
"""Prompt tokens, output tokens, bound on the time per output token."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is asked of the deployments: GPUs of a kind, how soon an answer begins, and the load that GPUs are counted for."""

    gpus: int = 16
    hardware: str = "h100-sxm"
    ttft_s: float = 4.0
    load_rps: float = 50.0

    def __post_init__(self) -> None:
        require_int("gpus", self.gpus, high=16384)
        if load_hardware(self.hardware).fits_from == ROOFLINE:
            raise SpecError(f"hardware={self.hardware!r}: must be a GPU; `tandem hardware` lists those of the catalogue")
        Slo(ttft_s=self.ttft_s)
        require_number("load_rps", self.load_rps, high=1e6)

    def slo(self, tpot_s: float) -> Slo:
        """Its bound with one on the time per output token."""
        return Slo(ttft_s=self.ttft_s, tpot_s=tpot_s)


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

    def best(self, cell: Cell) -> Option | None:
        """The recommended deployment with what it does."""
        plan = self.plans[cell]
        return None if plan is None else plan.best

    def mode(self, cell: Cell) -> Mode | None:
        """How the recommended deployment shares GPUs."""
        best = self.best(cell)
        return None if best is None else best.deployment.mode

    def per_gpu(self, cell: Cell) -> float | None:
        """Output tokens/s of a GPU in the best deployment."""
        best = self.best(cell)
        return None if best is None else best.tokens_per_s / best.deployment.gpus

    def goodput(self, cell: Cell) -> float | None:
        """Requests/s that the whole budget serves within the bounds."""
        best = self.best(cell)
        return None if best is None else best.requests_per_s

    def gpus_for(self, cell: Cell, load_rps: float) -> int | None:
        """GPUs that carry a load with instances as in the best deployment."""
        best = self.best(cell)
        return None if best is None else best.gpus_for(load_rps)

    def gain(self, cell: Cell) -> float | None:
        """Best split deployment over the best shared one; None where one of them does not meet the bounds."""
        plan = self.plans[cell]
        return None if plan is None else plan.gain


def cells() -> tuple[Cell, ...]:
    """All traffic under all bounds."""
    return tuple((isl, osl, tpot_s) for (isl, osl), tpot_s in product(TRAFFIC, TPOTS_S))


def candidates(setting: Setting, progress: Callable[[str], None] = lambda _: None) -> dict[Key, Candidate]:
    """Every shape of the recipe's widths at the depths of DEPTHS that is no larger than the 12B, the 12B itself included.

    Raises SpecError where neither the 12B nor the 9B can be served in any cell.
    """
    recipe = load_recipe(RECIPE)
    assert recipe.depth is not None
    assert recipe.width is not None
    teacher = load_spec(recipe.teacher)
    _refuse_hopeless(teacher, setting)
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
                plans=plans_of(spec, setting),
            )
    return found


def transformers(setting: Setting) -> dict[str, Candidate]:
    """Transformers of about the 9B's size in the same cells; they have no Mamba heads, and were not searched for."""
    found = {}
    for name in (TRANSFORMER, ANOTHER):
        spec = load_spec(name)
        key = (len(spec.layers), spec.hidden_size, 0, 0)
        found[short(name)] = Candidate(key=key, spec=spec, fixed_batch=None, plans=plans_of(spec, setting))
    return found


def short(name: str) -> str:
    """`Qwen3-8B`: a model without its publisher."""
    return name.rsplit("/", 1)[-1].removeprefix("Meta-")


def _refuse_hopeless(teacher: ModelSpec, setting: Setting) -> None:
    """One line, before minutes of work, where there is nothing to compare."""
    if all(plan_of(spec, cell, setting) is None for spec in (teacher, load_spec(SMALL)) for cell in cells()):
        raise SpecError(
            f"gpus={setting.gpus}, hardware={setting.hardware!r}, ttft_s={setting.ttft_s:g}: serve neither the 12B nor the 9B "
            "in any cell; add GPUs, take larger ones or relax the bound"
        )


def _key(depth: int, shape: Shape) -> Key:
    return depth, shape.hidden_size or 0, shape.ffn_size or 0, shape.mamba_heads or 0


def plans_of(spec: ModelSpec, setting: Setting) -> dict[Cell, Plan | None]:
    """The best deployment of a model in every cell."""
    return {cell: plan_of(spec, cell, setting) for cell in cells()}


def plan_of(spec: ModelSpec, cell: Cell, setting: Setting) -> Plan | None:
    """The best deployment of a model in a cell; None where nothing meets the bounds."""
    isl, osl, tpot_s = cell
    try:
        return find_plan(
            model=spec,
            hardware=setting.hardware,
            gpus=setting.gpus,
            workload=Workload.fixed(isl, osl),
            slo=setting.slo(tpot_s),
        )
    except NoPlanError:
        return None
