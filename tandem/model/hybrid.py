"""The decoder: any string of Mamba-2, attention, MLP and expert layers, built from the `ModelSpec` that the planner uses.

Read this file first, then `span.py` (where tokens stand), `state.py` (what is remembered), the mixers (`mamba2.py` with
`scan.py`, `attention.py`, `ffn.py`), and `kernels.py` and `native/` (what makes them fast). Names of weights are those of
Nemotron-H on the hub, whatever the architecture: `backbone.layers.N.mixer.q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tandem.model.attention import AttentionMixer
from tandem.model.ffn import MLPMixer, MoEMixer
from tandem.model.init import initialise
from tandem.model.inputs import check_beside, check_ids, check_next_ids, known_device
from tandem.model.linear import Linear
from tandem.model.mamba2 import Mamba2Mixer
from tandem.model.memory import return_freed_memory
from tandem.model.norm import RMSNorm
from tandem.model.precision import compute_dtype
from tandem.model.span import Span, compact
from tandem.model.state import LayerState, SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, MoE
from tandem.spec.units import require_int

if TYPE_CHECKING:
    from tandem.model.native.program import Program

PREFILL_TOKENS = 1024
"""Tokens that `prefill` runs through the layers at once, over all rows: bounds the memory of activations."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Special tokens of a checkpoint: they are no part of the arithmetic, so no part of the spec."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def check_supported(spec: ModelSpec) -> None:
    """Raise a SpecError that names the first layer which the decoder cannot compute exactly, and why."""
    for i, m in enumerate(spec.layers):
        reason = _unsupported(m)
        if reason:
            raise SpecError(
                f"layers[{i}] of {spec.name}: {reason}; the decoder has Mamba-2, attention, MLP and sigmoid MoE layers"
            )


def _unsupported(m: Mixer) -> str | None:
    match m:
        case Attention():
            if m.window is not None or m.sinks or m.output_gate or m.qk_norm not in ("none", "head"):
                return f"window={m.window}, sinks={m.sinks}, output_gate={m.output_gate}, qk_norm={m.qk_norm!r} is not built"
            if m.rope is not None and m.rope.scaling not in ("none", "linear", "llama3"):
                return f"rope scaling {m.rope.scaling!r} is not built"
            if m.rope is not None and int(m.head_dim * m.rope.fraction) % 2:
                return f"rope of fraction={m.rope.fraction} turns pairs, and head_dim={m.head_dim} leaves one over"
        case MoE():
            if m.score != "sigmoid" or m.gated or m.bias or m.shared_gate or not m.router_bias:
                gates = f"router_bias={m.router_bias}, shared_gate={m.shared_gate}"
                return f"experts with score={m.score!r}, gated={m.gated}, bias={m.bias}, {gates} are not built"
        case Mamba2() | MLP():
            return None
        case _:
            return f"{type(m).__name__} is not built"
    return None


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, m: Mixer, spec: ModelSpec) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.norm_eps
        self.norm = RMSNorm(hidden, eps)
        self.mixer: nn.Module
        match m:
            case Mamba2():
                self.mixer = Mamba2Mixer(m, hidden, eps)
            case Attention():
                self.mixer = AttentionMixer(m, hidden, eps)
            case MLP():
                self.mixer = MLPMixer(m, hidden)
            case MoE():
                self.mixer = MoEMixer(m, hidden)

    def forward(self, x: Float[Tensor, "b t d"], span: Span, state: LayerState = None) -> Float[Tensor, "b t d"]:
        """One residual step."""
        mixed: Tensor = self.mixer(self.norm(x), span, state)
        return x + mixed


class Backbone(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        unset = torch.empty(spec.vocab_size, spec.hidden_size)  # nn.Embedding draws none where it is given: see `Linear`
        self.embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=unset)
        self.layers = nn.ModuleList(Layer(m, spec) for m in spec.layers)
        self.norm_f = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.checkpoint: Callable[..., Tensor] | None = None
        """How a layer is run where it is to be computed again in the backward pass (`torch.utils.checkpoint.checkpoint`)."""

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        span: Span,
        state: SequenceState | None = None,
        after_layer: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Hidden states after the final norm; a `state` is continued in place, but for its lengths.

        `after_layer` is told each layer's number when its part of the state is complete.
        """
        weight = self.embeddings.weight
        x = self.embeddings(input_ids).to(compute_dtype(weight.dtype, weight.device))
        states = (None,) * len(self.layers) if state is None else state.layers
        run = self.checkpoint if state is None and torch.is_grad_enabled() else None
        long_prompt = state is not None and input_ids.numel() >= PREFILL_TOKENS and x.device.type == "cpu"
        for i, (layer, remembered) in enumerate(zip(self.layers, states, strict=True)):
            x = layer(x, span, remembered) if run is None else run(layer, x, span)
            if long_prompt:
                return_freed_memory()
            if after_layer is not None:
                after_layer(i)
        normed: Tensor = self.norm_f(x)
        return normed


class Decoder(nn.Module):
    """A language model of the architecture that `spec` describes, with fresh weights (`load_model` reads trained ones).

    `dtype` is that of the weights. On the meta device nothing is allocated or initialised.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        token_ids: TokenIds | None = None,
    ) -> None:
        check_supported(spec)
        device = known_device(device)
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise SpecError(f"dtype={dtype}: must be torch.float32, torch.float16 or torch.bfloat16")
        super().__init__()
        self.spec = spec
        self.token_ids = token_ids or TokenIds()
        self.source: Path | None = None  # where its checkpoint lies, for the tokenizer; set by load_model
        with torch.device(device):
            self.backbone = Backbone(spec)
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        if device.type != "meta":
            initialise(self.backbone, self.lm_head, spec, seed)
        keep = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        self.to(dtype)
        for name, buffer in keep.items():  # the router's correction stays fp32, as in transformers
            self.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embeddings.weight.device

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b t"] | Float[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        documents: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t vocab"]:
        """Logits of every token, fp32.

        `attention_mask` is 1 at tokens and 0 at padding, on either side; logits at padding mean nothing. `documents` numbers
        the documents packed into a row: where it changes, attention, convolution and SSM state begin anew.
        """
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask, documents=documents)
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def hidden_states(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b t"] | Float[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        documents: Int[Tensor, "b t"] | None = None,
        state: SequenceState | None = None,
        after_layer: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Hidden states after the final norm, in one pass; a `state` is continued in place, as of a given past: it keeps no
        gradients. A state holds one document a row, so there is none beside `documents`.

        `after_layer` is called with each layer's number as soon as that layer's state is complete, so that it can be sent
        while later layers compute.
        """
        check_ids("input_ids", input_ids, self.spec.vocab_size)
        check_beside("attention_mask", attention_mask, input_ids)
        check_beside("documents", documents, input_ids)
        if state is not None:
            if documents is not None:
                raise SpecError("documents: a state holds one document a row; leave out documents or state")
            self._prepare(state, input_ids)
        back = lengths = segments = None
        if attention_mask is not None and not bool(attention_mask.all()):
            documents = None if documents is None else compact(documents, attention_mask)[0]
            input_ids, lengths, back = compact(input_ids, attention_mask)
        if documents is not None:
            segments = torch.cat([torch.zeros_like(documents[:, :1]), (documents.diff(dim=1) != 0).cumsum(1)], 1)
        hidden = self._run(input_ids, lengths, segments, state, after_layer)
        return hidden if back is None else hidden.gather(1, back[..., None].expand_as(hidden))

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Int[Tensor, "b t"],
        state: SequenceState | None = None,
        *,
        attention_mask: Int[Tensor, "b t"] | Float[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        logits_to_keep: int = 1,
    ) -> tuple[Float[Tensor, "b kept vocab"], SequenceState]:
        """Read prompts, or go on from a state (in place): logits of each row's last `logits_to_keep` tokens, and the state.

        Long prompts pass through the layers a piece at a time, so memory does not grow with activations. 0 keeps the logits
        of all tokens, in the columns of `input_ids`; else the newest token is last, and a row with fewer than that many tokens
        has zeros before them. Never more columns than `input_ids` has.
        """
        check_ids("input_ids", input_ids, self.spec.vocab_size)
        check_beside("attention_mask", attention_mask, input_ids)
        require_int("logits_to_keep", logits_to_keep, low=0)
        batch, time = input_ids.shape
        if state is None:
            state = self.new_state(batch, capacity=time)
        self._prepare(state, input_ids)
        back = lengths = None
        if attention_mask is not None and not bool(attention_mask.all()):
            input_ids, lengths, back = compact(input_ids, attention_mask)
        wanted = time if logits_to_keep == 0 else min(logits_to_keep, time)
        width = max(1, PREFILL_TOKENS // batch)
        kept: list[Tensor] = []
        last = torch.zeros(batch, wanted, self.spec.hidden_size, dtype=self.state_dtype, device=self.device)
        for begin in range(0, time, width):
            piece = input_ids[:, begin : begin + width]
            here = None if lengths is None else (lengths - begin).clamp(0, piece.shape[1])
            hidden = self._run(piece, here, None, state)
            if logits_to_keep == 0:
                kept.append(hidden)
            else:
                last = _last_hidden(last, hidden, here)
        if logits_to_keep == 0:
            last = torch.cat(kept, 1)
            last = last if back is None else last.gather(1, back[..., None].expand_as(last))
        logits: Tensor = self.lm_head(last)
        return logits.float(), state

    @torch.no_grad()
    def decode(
        self, next_ids: Int[Tensor, " b"] | Int[Tensor, "b 1"], state: SequenceState
    ) -> tuple[Float[Tensor, "b vocab"] | Float[Tensor, "b 1 vocab"], SequenceState]:
        """One more token of each sequence: its logits (an axis of length 1 stays), and the state, changed in place."""
        check_next_ids(next_ids, state.batch)
        column = next_ids.reshape(-1, 1)
        check_ids("next_ids", column, self.spec.vocab_size)
        program = self._native_program()
        if program is not None:
            logits = program.decode(column[:, 0], state)[:, None]
        else:
            self._prepare(state, column)
            logits = self.lm_head(self._run(column, None, None, state)).float()
        return (logits if next_ids.dim() == 2 else logits[:, 0]), state

    def new_state(self, batch: int, *, capacity: int = 0) -> SequenceState:
        """State of `batch` sequences that have seen nothing."""
        return SequenceState.zeros(self.spec, batch, capacity=capacity, dtype=self.state_dtype, device=self.device)

    def _native_program(self) -> Program | None:
        """The whole decode step in C, where the model is on a CPU that has a compiler; else torch does it layer by layer."""
        if self.device.type != "cpu":
            return None
        from tandem.model.native.program import program_for

        program = program_for(self)
        return None if isinstance(program, Infeasible) else program

    @property
    def state_dtype(self) -> torch.dtype:
        """Of activations, keys, values and convolution windows."""
        return compute_dtype(self.backbone.embeddings.weight.dtype, self.device)

    def _run(
        self,
        input_ids: Int[Tensor, "b t"],
        lengths: Int[Tensor, " b"] | None,
        segments: Int[Tensor, "b t"] | None,
        state: SequenceState | None,
        after_layer: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "b t d"]:
        span = Span(
            time=input_ids.shape[1],
            device=self.device,
            lengths=lengths,
            starts=None if state is None or not bool(state.lengths.any()) else state.lengths.clone(),
            segments=segments,
        )
        hidden: Tensor = self.backbone(input_ids, span, state, after_layer)
        if state is not None:
            state.lengths += span.time if lengths is None else lengths
        return hidden

    def _prepare(self, state: SequenceState, input_ids: Int[Tensor, "b t"]) -> None:
        """Refuse a state that is not of this model and these rows; make room in it for the tokens."""
        state.check(self.spec, len(input_ids), self.device)
        state.reserve(int(state.lengths.max()) + input_ids.shape[1])


def _last_hidden(
    last: Float[Tensor, "b k d"], hidden: Float[Tensor, "b t d"], lengths: Int[Tensor, " b"] | None
) -> Float[Tensor, "b k d"]:
    """The last k hidden states of each row, `last` being those before."""
    width = last.shape[1]
    known = torch.cat([last, hidden], 1)
    if lengths is None:
        return known[:, -width:]
    index = lengths.to(known.device)[:, None] + torch.arange(width, device=known.device)
    return known.gather(1, index[..., None].expand(-1, -1, known.shape[2]))
