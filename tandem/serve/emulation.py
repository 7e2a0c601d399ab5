"""The workplace of emulated workers: what `tandem serve --emulate` serves with."""

from __future__ import annotations

import time
from collections.abc import Callable

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tandem.model.tokenizer import Tokenizer
from tandem.sched.route import Role, StepTimes
from tandem.sched.scale_rates import PoolRates
from tandem.serve.emulated import EmulatedEngine
from tandem.serve.emulated_host import EmulatedHost
from tandem.serve.emulated_state import Letters
from tandem.serve.hosts import WorkerHandle
from tandem.serve.messages import Capacity
from tandem.serve.options import Emulation, ServeOptions
from tandem.sim.build import config_of
from tandem.sim.config import WorkerKind
from tandem.sim.policies import PairRates, rates_of
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.workload import Slo

DEFAULT_TOKENS = 256
"""Output tokens of a chat whose request does not say: no answer ends by itself."""
PREFIX_SHARE = 0.25
"""Of a worker's room, in tokens, that prefixes of earlier prompts are kept for: they lie in blocks that nobody needs."""
_TEXT = "the quick brown fox jumps over the lazy dog "
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A token for each byte of UTF-8, made here: catalogue entries are sizes and bring none."""
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in symbols[:3]])
    return Tokenizer(inner, template=_TEMPLATE, special={"bos_token": "<s>", "eos_token": "</s>"})


def letters_of(tokenizer: Tokenizer) -> Letters:
    """The letters that answers are made of."""
    ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    return Letters(ids=tuple(ids), texts=tuple(tokenizer.decode([i]) for i in ids))


class Emulating:
    """Makes emulated workers of the kinds that a deployment has, all in this process."""

    def __init__(self, options: ServeOptions, emulation: Emulation, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = load_spec(options.model)
        self.tokenizer = byte_tokenizer()
        self._letters, self._options, self._emulation = letters_of(self.tokenizer), options, emulation
        self._config = config_of(emulation.deployment, context=emulation.context)
        self._kinds: dict[Role, WorkerKind] = {group.role: group.kind for group in self._config.groups}
        kinds = list(self._kinds.values())
        if options.scaling is not None and len({kind.gpus for kind in kinds}) > 1:
            raise SpecError("scale: workers of both roles must have as many GPUs, so that one can take the other role")
        self.times: StepTimes = _RoutingTimes(self._kinds)
        self._clock, self._count = clock, 0

    def worker(self, role: Role, *, late: bool = False) -> WorkerHandle:
        """One more worker."""
        number, start_up_s = self._count, 0.0
        self._count += 1
        kind = self._kind(role)
        if late:
            asked = self._emulation.start_up_s
            start_up_s = kind.start_up_s if asked is None else asked
        return EmulatedHost(f"{role}-{number}", lambda: self._build(kind), start_up_s=start_up_s, clock=self._clock)

    def rates(self, slo: Slo, capacity: Capacity) -> PoolRates:
        """From the tables by which the workers take their time."""
        return PairRates(rates_of(self._kind("prefill"), slo), rates_of(self._kind("decode"), slo))

    def start_up_s(self, took_s: float) -> float:
        """As predicted, or as the operator says."""
        asked = self._emulation.start_up_s
        return max(kind.start_up_s for kind in self._kinds.values()) if asked is None else asked

    def close(self) -> None:
        """Nothing is left of them."""

    def _kind(self, role: Role) -> WorkerKind:
        return self._kinds.get(role) or self._kinds.get("decode") or self._kinds["colocated"]

    def _build(self, kind: WorkerKind) -> tuple[EmulatedEngine, Capacity]:
        room = kind.blocks * kind.limits.block_size
        most = min(self._options.max_context or self.spec.max_context, room - 1)
        engine = EmulatedEngine(
            times=kind.times,
            limits=kind.limits,
            blocks=kind.blocks,
            max_context=most,
            letters=self._letters,
            prefix_tokens=int(PREFIX_SHARE * room),
            stride_s=self._emulation.stride_s,
        )
        return engine, Capacity(max_context=most, max_batch=kind.limits.max_batch, tokens=room)


class _RoutingTimes:
    """Prefills as they go where prompts are prefilled, decode steps as they go where sequences decode."""

    def __init__(self, kinds: dict[Role, WorkerKind]) -> None:
        decode = kinds.get("decode") or kinds["colocated"]
        prefill = kinds.get("prefill", decode)
        self.prefill_s, self.transfer_s, self.decode_s = (
            prefill.times.prefill_s,
            prefill.times.transfer_s,
            decode.times.decode_s,
        )
