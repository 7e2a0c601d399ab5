"""What a training run is made of: one frozen tree of settings, read from a YAML file and changed by field paths.

Every setting of a run is here and nothing else is, so the run that a recipe names can be made again. A field that a recipe
does not know is refused, with the names it does know. The 12b-* recipes state paper A's settings in the same fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int, require_number

LinearFormat = Literal["fp32", "bf16", "fp8-block", "fp8-tensor"]
SourceKind = Literal["jsonl", "parquet", "text", "hub", "procedural", "long-documents"]


def _from_0(field_name: str, value: float, high: float) -> float:
    """`value` where it is a number from 0 to `high`, or a SpecError that names the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
        raise SpecError(f"{field_name}={value!r}: must be a number from 0 to {high:g}")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """The model: a name of the catalogue, or a pattern over `M * -` with the sizes of its mixers."""

    name: str | None = None
    """A model of the catalogue, whose sizes are taken as they are; None where `pattern` is given."""
    pattern: str | None = None
    hidden_size: int | None = None
    ffn_size: int | None = None
    gated: bool = False
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    """None: no position embedding, as in Nemotron-H."""
    mamba_heads: int | None = None
    mamba_head_dim: int | None = None
    state_dim: int | None = None
    groups: int | None = None
    initial: str | None = None
    """A checkpoint to go on from: a folder, or the name of a released model. None: fresh weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerPart:
    """Byte-level BPE trained on the sources, or one that exists."""

    name: str | None = None
    """A folder or released model whose tokenizer is taken; None: one is trained."""
    vocab_size: int = 2048
    sample_bytes: int = 8_000_000
    """Text of all sources that it is trained on, in the proportion of their sizes."""

    def __post_init__(self) -> None:
        require_int("data.tokenizer.vocab_size", self.vocab_size, low=277, high=2**31)
        require_int("data.tokenizer.sample_bytes", self.sample_bytes, high=10**12)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePart:
    """One source of documents."""

    kind: SourceKind
    path: str | None = None
    """File or glob, from the recipe's folder or absolute; of a hub source the data set's name."""
    split: str = "train"
    config: str | None = None
    """Of a hub source: the name of its configuration."""
    text: str = "{text}"
    """How a row becomes a document: a template over its columns. Of a worked answer as GSM8K has them, `{column:steps}` is
    what comes before the result and `{column:result}` the result."""
    prompt: str | None = None
    """The part of a document before what is learned, likewise: a literal beginning of `text`. None: all of it is learned."""
    tasks: tuple[str, ...] = ()
    """Of a procedural source: the names of its tasks."""
    documents: int | None = None
    """How many documents a generated source has, or how many of a read one are taken; None: all of those that are read."""
    seed: int = 0
    length: int | None = None
    """Of long documents: tokens of each."""
    licence: str = "unknown"
    notice: str = ""

    def __post_init__(self) -> None:
        if self.documents is not None:
            require_int("documents", self.documents)
        if self.length is not None:
            require_int("length", self.length)
        generated = self.kind in ("procedural", "long-documents")
        for field_name, given, used in (
            ("tasks", self.tasks, generated),
            ("length", self.length, self.kind == "long-documents"),
            ("text", self.text if self.text != "{text}" else None, self.kind not in ("text", "procedural")),
            ("prompt", self.prompt, self.kind in ("jsonl", "parquet", "hub")),
        ):
            if given and not used:
                raise SpecError(f"{field_name}={given!r}: changes nothing for a source of kind {self.kind}; leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanPart:
    """What is done to documents before they are learned from."""

    min_chars: int = 1
    exact_duplicates: bool = True
    near_duplicates: float | None = 0.8
    """Jaccard similarity of word 5-grams at and above which a document is dropped (MinHash); None: none is."""
    decontaminate: tuple[str, ...] = ()
    """Files (JSONL) of evaluation sets; a document that shares an n-gram with one is dropped."""
    decontaminate_ngram: int = 13
    min_quality: float = 0.0
    """Documents below this score (0 to 1) are dropped."""
    max_bad_rows: int = 100
    """Rows that cannot be read are counted, named and skipped; more than this many of a source end the run."""

    def __post_init__(self) -> None:
        require_int("data.clean.min_chars", self.min_chars, low=0)
        require_int("data.clean.decontaminate_ngram", self.decontaminate_ngram)
        require_int("data.clean.max_bad_rows", self.max_bad_rows, low=0)
        _from_0("data.clean.min_quality", self.min_quality, 1.0)
        if self.near_duplicates is not None:
            require_number("data.clean.near_duplicates", self.near_duplicates, high=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePart:
    """A blend and the share of the run's tokens at which it ends."""

    until: float
    weights: dict[str, float]
    """Share of sequences by source; they are normalised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPart:
    """Where tokens come from, and in which proportions when."""

    tokenizer: TokenizerPart = field(default_factory=TokenizerPart)
    sources: dict[str, SourcePart]
    clean: CleanPart = field(default_factory=CleanPart)
    phases: tuple[PhasePart, ...]
    held_out: float = 0.02
    """Share of each source's documents that is kept for evaluation and never learned from."""
    cut: tuple[str, ...] = ()
    """Sources whose documents may be cut at the end of a sequence; of the others whole ones are packed."""

    def __post_init__(self) -> None:
        _from_0("data.held_out", self.held_out, 0.5)
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1.0:
            raise SpecError(f"data.phases: until={ends}: must rise and end with 1.0")
        for i, phase in enumerate(self.phases):
            unknown = set(phase.weights) - set(self.sources)
            if unknown:
                known = ", ".join(self.sources)
                raise SpecError(f"data.phases[{i}].weights={sorted(unknown)}: no such source; {known} are there")
            shares = phase.weights.values()
            if not shares or min(shares) < 0 or not 0 < sum(shares) < math.inf:
                raise SpecError(f"data.phases[{i}].weights={phase.weights}: must be shares of at least 0, one above 0")
        for name in self.cut:
            if name not in self.sources:
                raise SpecError(f"data.cut={name!r}: no such source; {', '.join(self.sources)} are there")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPart:
    """Tokens of an optimiser step."""

    sequence_length: int
    sequences: int
    """Of a step, over all ranks."""
    micro: int | None = None
    """Sequences of one forward pass of a rank; gradients of several are accumulated. None: all at once."""
    tokens: int
    """Of the whole run; rounded up to whole steps."""

    def __post_init__(self) -> None:
        require_int("batch.sequence_length", self.sequence_length)
        require_int("batch.sequences", self.sequences)
        require_int("batch.tokens", self.tokens, high=10**15)
        if self.micro is not None:
            require_int("batch.micro", self.micro, high=self.sequences)
            if self.sequences % self.micro:
                raise SpecError(f"batch.micro={self.micro}: must divide batch.sequences={self.sequences}")

    @property
    def tokens_per_step(self) -> int:
        """Positions that one step holds, padding included."""
        return self.sequence_length * self.sequences

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return -(-self.tokens // self.tokens_per_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimiserPart:
    """AdamW and its schedule (warm-up, stable, decay). Defaults are paper A's, but for the warm-up, which is not published."""

    lr: float = 4.5e-4
    min_lr: float = 4.5e-6
    schedule: Literal["wsd", "constant"] = "wsd"
    warmup: float = 0.0005
    """Share of the steps."""
    decay: float = 0.18
    """Share of the steps, at the end."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        require_number("optimiser.lr", self.lr)
        _from_0("optimiser.min_lr", self.min_lr, self.lr)
        for name in ("warmup", "decay"):
            _from_0(f"optimiser.{name}", getattr(self, name), 1.0)
        if self.warmup + self.decay > 1:
            raise SpecError(f"optimiser.decay={self.decay}: warm-up and decay together are longer than the run")
        require_number("optimiser.clip", self.clip)
        _from_0("optimiser.weight_decay", self.weight_decay, 1.0)
        for name in ("beta1", "beta2"):
            if _from_0(f"optimiser.{name}", getattr(self, name), 1.0) == 1.0:
                raise SpecError(f"optimiser.{name}=1.0: must be below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionPart:
    """Number formats. Weights, optimiser state and everything between linears is fp32 whatever stands here."""

    linears: LinearFormat = "bf16"
    """Operands of the linears: fp8-block is paper A's recipe, fp8-tensor that of Nemotron-H-56B (current scaling)."""
    keep_first: int = 4
    keep_last: int = 4
    """Linears at both ends that stay in bf16 where the others are fp8. Embedding and head always do."""

    def __post_init__(self) -> None:
        if self.linears not in get_args(LinearFormat):
            raise SpecError(f"precision.linears={self.linears!r}: must be one of {', '.join(get_args(LinearFormat))}")
        require_int("precision.keep_first", self.keep_first, low=0)
        require_int("precision.keep_last", self.keep_last, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPart:
    """How a run is spread over ranks: `fully_shard` over all of them here; the rest is what plans of larger runs state."""

    gpus: int = 1
    tp: int = 1
    cp: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: of attention and Mamba mixers' inside, or of whole layers."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tp", "cp"):
            require_int(f"parallel.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPart:
    """When the state of a run is saved."""

    every: int = 200
    """Steps."""
    keep: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        require_int("checkpoint.every", self.every)
        require_int("checkpoint.keep", self.keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatePart:
    """What is looked at on the way."""

    every: int = 200
    """Steps."""
    batches: int = 8
    """Held-out batches of each source."""
    samples: tuple[str, ...] = ()
    """Prompts whose greedy continuations are written to the log."""
    tasks: tuple[str, ...] = ()
    """Procedural tasks whose answers are verified at the end."""
    problems: int = 200
    """Of each task."""
    needles: tuple[int, ...] = ()
    """Tokens of the texts in which facts are asked for at the end (`tandem.train.needles`)."""
    needle_cases: int = 40
    """Of each kind and length."""

    def __post_init__(self) -> None:
        for name in ("every", "batches", "problems", "needle_cases"):
            require_int(f"evaluate.{name}", getattr(self, name))
        for length in self.needles:
            require_int("evaluate.needles", length)


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardPart:
    """What is done about a loss that is not a number or far above what it was."""

    window: int = 50
    """Steps whose losses say what is usual."""
    spike: float = 2.0
    """A loss above the window's median by this much (nats) is a spike."""
    retries: int = 3
    """Returns to the last good checkpoint before the run ends with an error; each skips the batches that did it."""

    def __post_init__(self) -> None:
        require_int("guard.window", self.window)
        require_number("guard.spike", self.spike)
        require_int("guard.retries", self.retries, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A complete training run."""

    name: str
    about: str = ""
    seed: int = 0
    model: ModelPart
    data: DataPart
    batch: BatchPart
    optimiser: OptimiserPart = field(default_factory=OptimiserPart)
    precision: PrecisionPart = field(default_factory=PrecisionPart)
    parallel: ParallelPart = field(default_factory=ParallelPart)
    checkpoint: CheckpointPart = field(default_factory=CheckpointPart)
    evaluate: EvaluatePart = field(default_factory=EvaluatePart)
    guard: GuardPart = field(default_factory=GuardPart)
    compile: bool = False
    """Run the model through torch.compile."""
    hardware: str | None = None
    """GPU that the run is planned on; None: this machine's CPU."""
    plan_only: str | None = None
    """Why the recipe is for `--plan` only; None: it can be run."""

    def __post_init__(self) -> None:
        require_int("seed", self.seed, low=0, high=2**31)
