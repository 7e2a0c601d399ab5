from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compress_cases import HYBRID, LLAMA, MAMBA, samples, shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.compress.keep import Kept, LayerUnits, best_of_groups, choose
from tandem.compress.layers import LoadedLayers
from tandem.compress.prune import prune_decoder, prune_folder
from tandem.compress.shape import Shape, pruned_spec
from tandem.compress.width import score_width
from tandem.model.hybrid import Decoder
from tandem.model.load import load_model, save_model
from tandem.spec.errors import SpecError
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec, MoE


def logits(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder(samples(decoder.spec).input_ids)


@pytest.mark.parametrize("spec", [HYBRID, LLAMA])
def test_pruning_nothing_changes_nothing(spec: ModelSpec) -> None:
    decoder = shaken(spec)
    kept = choose(spec, Shape(), score_width(LoadedLayers(decoder), samples(spec)))
    student = prune_decoder(decoder, kept)
    assert student.spec == spec
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


SHAPE = Shape(
    hidden_size=24, ffn_size=40, mamba_heads=2, mamba_head_dim=6, attention_heads=2, experts=4, expert_ffn_size=8,
    layers=(0, 1, 2, 4, 5),
)  # fmt: skip


def test_every_tensor_has_the_shape_that_the_specification_says(tmp_path: Path) -> None:
    decoder = shaken(HYBRID)
    kept = choose(HYBRID, SHAPE, score_width(LoadedLayers(decoder), samples(HYBRID)))
    student = prune_decoder(decoder, kept, name="small")
    assert student.spec == pruned_spec(HYBRID, SHAPE, name="small")
    assert sum(p.numel() for p in student.parameters()) + sum(b.numel() for b in student.buffers()) == student.spec.parameters
    assert bool(logits(student).isfinite().all())
    save_model(student, tmp_path / "small")
    assert torch.equal(logits(load_model(tmp_path / "small")), logits(student))


def silence(decoder: Decoder, shape: Shape) -> Kept:
    """Make units that a shape does not keep worth nothing, spread over the axes; what is left, by hand."""
    kept, draw = {}, torch.Generator().manual_seed(9)

    def some(size: int, count: int, groups: int = 1) -> Tensor:
        return best_of_groups(torch.rand(size, generator=draw), count, groups)

    for i in shape.kept_layers(decoder.spec):
        mixer, m = decoder.backbone.layers[i].mixer, decoder.spec.layers[i]
        if isinstance(m, MLP):
            units = some(m.ffn_size, shape.ffn_size or m.ffn_size)
            kept[i] = LayerUnits(ffn=units)
            _zero(mixer.down_proj.weight, 1, units)
        elif isinstance(m, Attention):
            units = some(m.num_heads, shape.attention_heads or m.num_heads, m.num_kv_heads)
            kept[i] = LayerUnits(heads=units)
            _zero(mixer.o_proj.weight, 1, (units[:, None] * m.head_dim + torch.arange(m.head_dim)).flatten())
        elif isinstance(m, MoE):
            experts = some(m.num_experts, shape.experts or m.num_experts)
            inside = torch.stack([some(m.ffn_size, shape.expert_ffn_size or m.ffn_size) for _ in experts])
            kept[i] = LayerUnits(experts=experts, expert_ffn=inside)
            for expert, neurons in zip(experts.tolist(), inside, strict=True):
                _zero(mixer.experts.down_proj.data[expert], 1, neurons)
            gone = torch.ones(m.num_experts, dtype=torch.bool).index_fill(0, experts, False)
            mixer.gate.e_score_correction_bias[gone] = -10.0  # no token is sent there
        else:
            kept[i] = LayerUnits(heads=torch.arange(m.num_heads), channels=torch.arange(m.head_dim))
    for i, layer in enumerate(decoder.backbone.layers):
        if i not in kept:
            for name in ("out_proj", "o_proj", "down_proj"):
                if hasattr(layer.mixer, name):
                    getattr(layer.mixer, name).weight.data.zero_()
    return Kept(shape=shape, hidden=torch.arange(decoder.spec.hidden_size), units=kept)


def _zero(weight: Tensor, axis: int, kept: Tensor) -> None:
    gone = torch.ones(weight.shape[axis], dtype=torch.bool).index_fill(0, kept, False)
    weight.data.index_fill_(axis, gone.nonzero()[:, 0], 0.0)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([16, 40, 48]), st.sampled_from([2, 4]), st.sampled_from([3, 6]), st.sampled_from([5, 12]),
    st.sampled_from([None, (0, 1, 2, 4, 5), (0, 2, 3, 4)]),
)  # fmt: skip
def test_units_that_add_nothing_can_go(ffn: int, heads: int, experts: int, inside: int, layers: tuple[int, ...] | None) -> None:
    shape = Shape(ffn_size=ffn, attention_heads=heads, experts=experts, expert_ffn_size=inside, layers=layers)
    decoder = shaken(HYBRID, seed=ffn)
    kept = silence(decoder, shape)
    assert torch.allclose(logits(prune_decoder(decoder, kept)), logits(decoder), atol=2e-5)


def test_channels_that_are_always_zero_can_go_but_for_the_mean_of_the_norm() -> None:
    """A root of mean squares over fewer channels is larger by the root of the share; the norms' weights take it up."""
    spec = ModelSpec(name="m", vocab_size=64, hidden_size=32, layers=HYBRID.layers, norm_eps=1e-12)
    decoder, hidden = shaken(spec), best_of_groups(torch.rand(32, generator=torch.Generator().manual_seed(2)), 24, 1)
    gone = torch.ones(32, dtype=torch.bool).index_fill(0, hidden, False)
    with torch.no_grad():
        decoder.backbone.embeddings.weight[:, gone] = 0
        for layer in decoder.backbone.layers:
            for name, parameter in layer.mixer.named_parameters():
                if name.startswith(("out_proj", "o_proj", "down_proj", "shared_experts.down_proj")):
                    parameter[gone] = 0
                if name == "experts.down_proj":
                    parameter[:, gone] = 0
    everything = choose(spec, Shape(), score_width(LoadedLayers(decoder), samples(spec)))
    student = prune_decoder(decoder, Kept(shape=Shape(hidden_size=24), hidden=hidden, units=everything.units))
    with torch.no_grad():
        for module in [*(layer.norm for layer in student.backbone.layers), student.backbone.norm_f]:
            module.weight *= (32 / 24) ** 0.5
    assert torch.allclose(logits(student), logits(decoder), atol=2e-5)


def permuted(decoder: Decoder, heads: list[int], channels: list[int]) -> Decoder:
    """The same model with the heads and channels of its Mamba layers in another order."""
    units = {
        i: LayerUnits(
            ffn=torch.arange(48), heads=torch.tensor(heads if isinstance(m, Mamba2) else [0, 1, 2, 3]),
            channels=torch.tensor(channels), experts=torch.arange(6), expert_ffn=torch.arange(12).expand(6, -1),
        )
        for i, m in enumerate(decoder.spec.layers)
    }  # fmt: skip
    return prune_decoder(decoder, Kept(shape=Shape(), hidden=torch.arange(32), units=units))


def test_heads_may_change_places_inside_their_group_only() -> None:
    """Facts of paper A: within a group 4e-7, across groups 0.3, channels alike in all heads 2e-7."""
    decoder = shaken(HYBRID)
    before, same = logits(decoder), list(range(8))
    assert torch.allclose(logits(permuted(decoder, [1, 0, 3, 2], same)), before, atol=1e-5)
    assert torch.allclose(logits(permuted(decoder, [0, 1, 2, 3], same[::-1])), before, atol=1e-5)
    assert (logits(permuted(decoder, [2, 1, 0, 3], same)) - before).abs().max() > 1e-2


def test_a_cut_of_mamba_is_the_model_without_those_heads() -> None:
    """Against the teacher with the lost heads silenced behind the gated norm, whose mean is over what stays."""
    spec = ModelSpec(name="m", vocab_size=64, hidden_size=32, layers=(MAMBA,), norm_eps=1e-12)
    decoder = shaken(spec)
    units = {0: LayerUnits(heads=torch.tensor([1, 2]), channels=torch.arange(8))}
    student = prune_decoder(decoder, Kept(shape=Shape(mamba_heads=2), hidden=torch.arange(32), units=units))
    mixer = decoder.backbone.layers[0].mixer
    gone = (torch.tensor([0, 3])[:, None] * 8 + torch.arange(8)).flatten()
    with torch.no_grad():
        mixer.in_proj.weight[gone] = 0  # z: silu(0) = 0, so nothing of the head comes into the norm
        mixer.norm.weight /= 2**0.5  # whose mean is over twice as many
    assert torch.allclose(logits(student), logits(decoder), atol=1e-5)


@pytest.mark.parametrize(("spec", "shape"), [(HYBRID, SHAPE), (LLAMA, Shape(hidden_size=16, ffn_size=32, attention_heads=2))])
def test_a_checkpoint_is_cut_as_a_model_in_memory_is(tmp_path: Path, spec: ModelSpec, shape: Shape) -> None:
    decoder = shaken(spec)
    save_model(decoder.to(torch.bfloat16), tmp_path / "teacher", max_shard_bytes=30_000)
    decoder = load_model(tmp_path / "teacher", dtype="auto")
    kept = choose(decoder.spec, shape, score_width(LoadedLayers(decoder), samples(spec)))
    written = prune_folder(tmp_path / "teacher", kept, tmp_path / "student", name="small", max_shard_bytes=10_000)
    here = prune_decoder(decoder, kept, name="small")
    there = load_model(tmp_path / "student", dtype="auto")
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 1
    assert written == here.spec
    assert here.state_dict().keys() == there.state_dict().keys()
    for name, value in here.state_dict().items():
        assert value.dtype == there.state_dict()[name].dtype, name
        assert torch.equal(value, there.state_dict()[name]), name


def test_without_groups_heads_are_ranked_together() -> None:
    decoder = shaken(HYBRID)
    scores = score_width(LoadedLayers(decoder), samples(HYBRID))
    scores.mamba[0].copy_(torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None].expand(-1, 8))
    shape = Shape(mamba_heads=2)
    aware, blind = (choose(HYBRID, shape, scores, group_aware=aware).units[0].heads for aware in (True, False))
    assert aware is not None
    assert blind is not None
    assert (aware.tolist(), blind.tolist()) == ([0, 2], [0, 1])


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    kept = choose(HYBRID, Shape(), score_width(LoadedLayers(shaken(HYBRID)), samples(HYBRID)))
    with pytest.raises(SpecError, match="its weights are not here"):
        prune_folder("qwen3-8b", kept, tmp_path / "out")
    assert not (tmp_path / "out").exists()
