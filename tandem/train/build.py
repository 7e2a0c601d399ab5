"""From a recipe's model part to the `ModelSpec` that planner, decoder and engine share."""

from __future__ import annotations

from dataclasses import replace

from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, Mixer, ModelSpec, Rope
from tandem.train.recipe import ModelPart, Recipe


def model_spec(recipe: Recipe) -> ModelSpec:
    """The model that a recipe trains: the catalogue's as it is, or the pattern with the recipe's vocabulary."""
    part, name = recipe.model, recipe.name
    if part.name is not None:
        if part.pattern is not None:
            raise SpecError(
                f"model.pattern={part.pattern!r}: leave it out where model.name={part.name!r} says what the model is"
            )
        return load_spec(part.name)
    if part.pattern is None:
        raise SpecError("model.pattern=None: give a pattern over M * -, or model.name")
    makers = {"M": _mamba, "*": _attention, "-": _mlp}
    unknown = sorted(set(part.pattern) - set(makers))
    if unknown or not part.pattern:
        raise SpecError(f"model.pattern={part.pattern!r}: must be of M (Mamba-2), * (attention) and - (MLP)")
    mixers = {letter: makers[letter](part) for letter in set(part.pattern)}
    return ModelSpec(
        name=name,
        vocab_size=recipe.data.tokenizer.vocab_size,
        hidden_size=_given(part, "hidden_size"),
        layers=tuple(mixers[letter] for letter in part.pattern),
        max_context=max(recipe.batch.sequence_length, 2048),
        native_precision="bf16",
    )


def with_vocabulary(spec: ModelSpec, vocab_size: int) -> ModelSpec:
    """The spec for a tokenizer that came out smaller than asked for, as little text gives one."""
    return replace(spec, vocab_size=vocab_size)


def _given(part: ModelPart, field: str) -> int:
    value: int | None = getattr(part, field)
    if value is None:
        raise SpecError(f"model.{field}=None: the pattern {part.pattern!r} needs it")
    return value


def _mamba(part: ModelPart) -> Mixer:
    return Mamba2(
        num_heads=_given(part, "mamba_heads"),
        head_dim=_given(part, "mamba_head_dim"),
        state_dim=_given(part, "state_dim"),
        groups=_given(part, "groups"),
    )


def _attention(part: ModelPart) -> Mixer:
    return Attention(
        num_heads=_given(part, "num_heads"),
        num_kv_heads=_given(part, "num_kv_heads"),
        head_dim=_given(part, "head_dim"),
        rope=None if part.rope_theta is None else Rope(theta=part.rope_theta),
    )


def _mlp(part: ModelPart) -> Mixer:
    return MLP(ffn_size=_given(part, "ffn_size"), gated=part.gated)
