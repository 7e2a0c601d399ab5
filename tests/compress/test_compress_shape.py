"""What a shape keeps, as a specification, and the bytes that serving it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.compress.shape import Shape, pruned_spec, shape_name, shape_of, total_bytes
from tandem.model.naming import decoder_shapes
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec, MoE
from tandem.spec.units import GIB

TEACHER = ModelSpec(
    name="toy",
    vocab_size=96,
    hidden_size=32,
    layers=(
        Mamba2(num_heads=8, head_dim=4, state_dim=8, groups=2),
        MLP(ffn_size=64, gated=False),
        Attention(num_heads=6, num_kv_heads=2, head_dim=8),
        MLP(ffn_size=64, gated=False),
        Mamba2(num_heads=8, head_dim=4, state_dim=8, groups=2),
        MoE(num_experts=12, top_k=3, ffn_size=16, gated=True, shared_ffn_size=8, groups=4, top_groups=2),
    ),
)
"""One layer of every kind that is pruned, with groups everywhere."""
LAYER_KINDS = {Mamba2: "M", Attention: "*", MLP: "-"}


def pattern(spec: ModelSpec) -> str:
    return "".join(LAYER_KINDS[type(m)] for m in spec.layers)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Shapes that the toy teacher can be cut to, all its kinds of layers kept."""
    extra = draw(st.sets(st.sampled_from((3, 4))))
    return Shape(
        layers=tuple(sorted({0, 1, 2, 5} | extra)),
        hidden_size=draw(st.integers(1, 32)),
        ffn_size=draw(st.integers(1, 64)),
        mamba_heads=draw(st.sampled_from((2, 4, 6, 8))),
        mamba_head_dim=draw(st.integers(1, 4)),
        attention_heads=draw(st.sampled_from((2, 4, 6))),
        experts=draw(st.sampled_from((8, 12))),
        expert_ffn_size=draw(st.integers(1, 16)),
    )


def test_a_shape_that_names_nothing_or_every_size_of_the_teacher_gives_the_teacher() -> None:
    assert pruned_spec(TEACHER, Shape()) == TEACHER
    assert shape_name(TEACHER, Shape()) == TEACHER.name
    assert pruned_spec(TEACHER, shape_of(TEACHER)) == TEACHER
    assert pruned_spec(TEACHER, Shape(layers=(0, 1, 2, 3, 4, 5))) == TEACHER


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_the_pruned_model_has_the_sizes_of_its_shape_and_no_tensor_beyond_the_teachers(shape: Shape) -> None:
    spec = pruned_spec(TEACHER, shape, name="small")
    assert replace(shape_of(spec), layers=shape.layers) == shape
    tensors, teachers = decoder_shapes(spec), decoder_shapes(TEACHER)
    assert sum(_count(t) for t in tensors.values()) == spec.parameters
    for i, old in enumerate(shape.kept_layers(TEACHER)):
        prefix = f"backbone.layers.{i}."
        for name, size in tensors.items():
            if name.startswith(prefix):
                whole = teachers[f"backbone.layers.{old}." + name.removeprefix(prefix)]
                assert len(size) == len(whole)
                assert all(a <= b for a, b in zip(size, whole, strict=True))
    assert shape_name(TEACHER, shape).startswith(
        f"toy-{len(shape.kept_layers(TEACHER))}L-h{shape.hidden_size}-f{shape.ffn_size}-m"
    )
    assert Shape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def _count(size: tuple[int, ...]) -> int:
    total = 1
    for n in size:
        total *= n
    return total


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(1, 4096), st.integers(1, 9), st.integers(0, 10**9))
def test_bytes_are_weights_caches_and_overhead_and_never_above_the_teachers(
    shape: Shape, context: int, batch: int, overhead: int
) -> None:
    spec = pruned_spec(TEACHER, shape)
    held = total_bytes(spec, context=context, batch=batch, overhead_bytes=overhead)
    each = spec.kv_bytes(context) + spec.conv_bytes() + spec.ssm_bytes()
    assert held == 2 * spec.parameters + batch * each + overhead
    assert held <= total_bytes(TEACHER, context=context, batch=batch, overhead_bytes=overhead)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 33}, "hidden_size=33: must be at most the 32 of toy"),
        ({"ffn_size": 65}, "ffn_size=65: must be at most the 64 of layer 1 of toy"),
        ({"mamba_heads": 5}, "mamba_heads=5: must be a multiple of 2"),
        ({"mamba_heads": 10}, "mamba_heads=10: must be at most the 8 of layer 0"),
        ({"mamba_head_dim": 5}, "mamba_head_dim=5: must be at most the 4"),
        ({"attention_heads": 3}, "attention_heads=3: must be a multiple of 2"),
        ({"attention_heads": 8}, "attention_heads=8: must be at most the 6"),
        ({"experts": 2}, "experts=2: must be at least the 3"),
        ({"experts": 6}, "experts=6: must be a multiple of 4"),
        ({"experts": 4}, "experts=4: must be at least 8"),
        ({"expert_ffn_size": 17}, "expert_ffn_size=17: must be at most the 16"),
        ({"layers": (0, 6)}, "layers=6: toy has layers 0 to 5"),
        ({"layers": (0, 1), "experts": 8}, "experts=8: no layer that is kept of toy has one; there are hidden_size, ffn_size"),
    ],
)
def test_what_slicing_cannot_give_is_refused_in_one_line(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        pruned_spec(TEACHER, Shape(**sizes))
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"layers": ()}, "layers=(): must name one"),
        ({"layers": (1, 1)}, "layers=[1, 1]: must rise"),
        ({"layers": (2, 1)}, "layers=[2, 1]: must rise"),
        ({"layers": (-1, 1)}, "layers=-1"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"ffn_size": True}, "ffn_size=True"),
        ({"mamba_heads": 2.5}, "mamba_heads=2.5"),
    ],
)
def test_a_shape_is_valid_from_birth(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        Shape(**sizes)
    assert str(refused.value).startswith(said)


def test_an_unknown_size_and_a_negative_overhead_are_refused() -> None:
    with pytest.raises(SpecError, match="heads=4: no size of a shape"):
        Shape.from_json({"heads": 4})
    with pytest.raises(SpecError, match="overhead_bytes=-1"):
        total_bytes(TEACHER, context=8, overhead_bytes=-1)


def test_layers_of_one_kind_with_different_sizes_have_no_one_shape() -> None:
    uneven = replace(TEACHER, layers=(*TEACHER.layers, MLP(ffn_size=48, gated=False)))
    with pytest.raises(SpecError, match=r"layers\[6\].ffn_size=48: differs from 64"):
        shape_of(uneven)
    with pytest.raises(SpecError, match="ffn_size=64: must be at most the 48 of layer 6"):
        pruned_spec(uneven, Shape(ffn_size=64))


# facts of paper A, sections 1.1 and 4.1
NANO_12B, NANO_9B = "nvidia/NVIDIA-Nemotron-Nano-12B-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"


def test_bytes_of_the_papers_models_at_128k_are_the_papers() -> None:
    found = {name: total_bytes(load_spec(name), context=131072) / GIB for name in (NANO_12B, NANO_9B)}
    assert found[NANO_12B] == pytest.approx(26.07, abs=0.005)
    assert found[NANO_9B] == pytest.approx(18.69, abs=0.005)


def subsequence(whole: str, part: str) -> tuple[int, ...] | None:
    """Indices of the first way to have `part` by deleting characters of `whole`; None where there is none."""
    found, at = [], 0
    for letter in part:
        at = whole.find(letter, at)
        if at < 0:
            return None
        found.append(at)
        at += 1
    return tuple(found)


def test_the_9b_is_the_12b_with_six_layers_deleted_and_narrowed() -> None:
    teacher, student = load_spec(NANO_12B), load_spec(NANO_9B)
    layers = subsequence(pattern(teacher), pattern(student))
    assert layers is not None
    assert len(layers) == 56
    deleted = sorted(set(range(62)) - set(layers))
    assert sorted(pattern(teacher)[i] for i in deleted) == sorted("**---M")
    assert all(a < b for a, b in pairwise(layers))
    narrow = Shape(layers=layers, hidden_size=4480, ffn_size=15680)
    assert pruned_spec(teacher, narrow, name=student.name) == student
    deep = pruned_spec(teacher, Shape(layers=layers))
    assert pattern(deep) == pattern(student)
    assert sum(isinstance(m, Attention) for m in deep.layers) == 4
    assert pruned_spec(teacher, narrow).parameters == 8_888_227_328
