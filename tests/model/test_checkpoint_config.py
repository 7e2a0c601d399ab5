"""config.json from a specification and back, in whichever format can say it; names and shapes of the tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tandem.model.config_out import hub_format, read_token_ids, token_fields, write_config
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.naming import decoder_shapes, stored_tensors
from tandem.spec.errors import SpecError
from tandem.spec.huggingface import read_config
from tandem.spec.mixers import MLP, Attention, Mamba2, MoE, Rope
from tandem.spec.model import ModelSpec

ROPE = Rope(theta=10000.0)
LINEAR = Rope(theta=1e4, scaling="linear", factor=2.0)
LLAMA3 = Rope(theta=5e5, scaling="llama3", factor=8.0, original_max_context=256)

mixers = st.one_of(
    st.builds(
        Mamba2,
        num_heads=st.sampled_from([2, 4]), head_dim=st.sampled_from([4, 8]), state_dim=st.sampled_from([4, 8]),
        groups=st.sampled_from([1, 2]), conv_kernel=st.sampled_from([2, 4]), conv_bias=st.booleans(), proj_bias=st.booleans(),
        dt_min=st.sampled_from([0.0, 1e-3]), dt_max=st.sampled_from([None, 0.1]),
    ),
    st.builds(
        Attention,
        num_heads=st.sampled_from([2, 4]), num_kv_heads=st.sampled_from([1, 2]), head_dim=st.sampled_from([4, 8]),
        rope=st.sampled_from([None, ROPE, LLAMA3, LINEAR, Rope(theta=1e4, fraction=0.5)]),
        qk_norm=st.sampled_from(["none", "head"]), qkv_bias=st.booleans(), out_bias=st.booleans(),
    ),
    st.builds(MLP, ffn_size=st.sampled_from([16, 24]), gated=st.booleans(), bias=st.booleans()),
    st.builds(
        MoE,
        num_experts=st.just(4), top_k=st.sampled_from([1, 2]), ffn_size=st.just(8), gated=st.just(False),
        shared_ffn_size=st.sampled_from([0, 8]), latent_size=st.sampled_from([None, 8]), router_bias=st.just(True),
        score=st.just("sigmoid"), normalise=st.booleans(), score_scale=st.sampled_from([1.0, 2.5]),
        groups=st.sampled_from([2, 4]), top_groups=st.sampled_from([1, 2]),
    ),
)  # fmt: skip
blocks = st.tuples(
    st.builds(
        Attention,
        num_heads=st.sampled_from([2, 4]), num_kv_heads=st.sampled_from([1, 2]), head_dim=st.sampled_from([4, 8]),
        rope=st.sampled_from([ROPE, LLAMA3]), qk_norm=st.sampled_from(["none", "head"]), qkv_bias=st.booleans(),
        out_bias=st.booleans(),
    ),
    st.builds(MLP, ffn_size=st.sampled_from([16, 24]), gated=st.just(True), bias=st.booleans()),
)  # fmt: skip
layers = st.one_of(
    st.lists(mixers, min_size=1, max_size=5).map(tuple),
    st.builds(lambda block, n: block * n, blocks, st.integers(1, 3)),
    st.builds(lambda kinds, n: tuple(kinds) * n, st.lists(mixers, min_size=1, max_size=3), st.integers(1, 2)),
)
specs = st.builds(
    lambda layers, tied, eps: ModelSpec(
        name="tiny", vocab_size=96, hidden_size=32, layers=layers, tied_embeddings=tied, max_context=512, norm_eps=eps
    ),
    layers,
    st.booleans(),
    st.sampled_from([1e-5, 1e-6]),
)


@given(specs)
@settings(max_examples=150, deadline=None)
def test_names_and_shapes_are_those_of_the_decoder_and_of_its_format(spec: ModelSpec) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(spec, device="meta").state_dict().items()}
    if spec.tied_embeddings:
        del shapes["lm_head.weight"]
    assert decoder_shapes(spec) == shapes
    names = [stored.name for stored in stored_tensors(spec, hub_format(spec))]
    assert len(set(names)) == len(names)
    assert {stored.parameter for stored in stored_tensors(spec, hub_format(spec))} == shapes.keys()


@given(specs, st.tuples(st.none() | st.just(7), st.lists(st.integers(0, 9), max_size=3)))
@settings(max_examples=150, deadline=None)
def test_reading_a_written_config_gives_the_model_again(spec: ModelSpec, tokens: tuple[int | None, list[int]]) -> None:
    ends = TokenIds(bos=tokens[0], eos=tuple(tokens[1]))
    config = json.loads(json.dumps(write_config(spec, ends), allow_nan=False))
    form = config["model_type"]
    assert form == hub_format(spec)
    again = ModelSpec.from_json(config["spec"]) if form == "tandem" else read_config(config, name=spec.name)
    assert again == spec
    assert read_token_ids(config) == ends
    if form != "tandem":
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            theirs = AutoConfig.from_pretrained(folder)
        assert theirs.num_hidden_layers == len(spec.layers) // (1 if form == "nemotron_h" else 2)
        assert read_config(json.loads(theirs.to_json_string(use_diff=False)), name=spec.name) == spec


def test_token_ids_of_the_generation_config_go_first() -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}
    assert read_token_ids(config, {"eos_token_id": [2, 12]}) == TokenIds(bos=1, eos=(2, 12))
    assert token_fields(TokenIds(eos=(4,))) == {"bos_token_id": None, "eos_token_id": 4, "pad_token_id": None}
    with pytest.raises(SpecError, match="eos_token_id=-3"):
        read_token_ids({"eos_token_id": -3})
