"""Folders of the Hugging Face adapter: written and read back, by us, by the Auto classes and by a trainer that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from specs import any_models, build, hybrids, tokens
from specs import transformers as blocks
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from tandem.model.hf import TandemConfig, TandemForCausalLM, TandemModel
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, save_model
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.model import Attention, Mamba2, ModelSpec, MoE, Rope

FEW = settings(deadline=None, max_examples=8)
SPEC = ModelSpec(
    name="small",
    vocab_size=40,
    hidden_size=16,
    layers=(
        Mamba2(num_heads=2, head_dim=8, state_dim=4, groups=1),
        Attention(num_heads=2, num_kv_heads=1, head_dim=8, rope=Rope(theta=100.0)),
        MoE(num_experts=3, top_k=2, ffn_size=8, gated=False, router_bias=True, score="sigmoid"),
    ),
)
IDS = tokens(SPEC, 2, 7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    decoder = build(SPEC)
    decoder.token_ids = TokenIds(bos=1, eos=(2, 3), pad=0)
    TandemForCausalLM.from_decoder(decoder).save_pretrained(folder)
    return folder


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]


@FEW
@given(any_models())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec) -> None:
    folder = tmp_path_factory.mktemp("any")
    model = TandemForCausalLM.from_decoder(build(spec))
    model.save_pretrained(folder)
    ids = tokens(spec, 1, 5)
    assert torch.equal(TandemForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
    assert torch.equal(load_model(folder)(ids), model(ids).logits)
    assert load_spec(folder) == spec


@FEW
@given(hybrids() | blocks("llama") | blocks("qwen3"))
def test_folders_of_save_model_are_read_whatever_their_format(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec
) -> None:
    folder = tmp_path_factory.mktemp("hub")
    decoder = build(spec)
    save_model(decoder, folder)
    model = TandemForCausalLM.from_pretrained(folder)
    ids = tokens(spec, 1, 5)
    assert torch.equal(model(ids).logits, decoder(ids))
    assert model.config.name_or_path == str(folder)


def test_names_are_those_of_the_hub_and_the_configuration_is_ours(saved: Path) -> None:
    names = set(shards(saved)[0])
    assert {"lm_head.weight", "backbone.embeddings.weight", "backbone.layers.2.mixer.experts.1.up_proj.weight"} <= names
    assert all(name.startswith(("backbone.", "lm_head.")) for name in names)
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("tandem", ["TandemForCausalLM"])
    assert "hidden_size" not in config  # said once, in the specification


def test_auto_classes_find_the_model(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, TandemConfig)
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(model, TandemForCausalLM)
    hidden = AutoModel.from_pretrained(saved)
    assert isinstance(hidden, TandemModel)
    assert torch.equal(model.lm_head(hidden(IDS).last_hidden_state), model(IDS).logits)
    fresh = AutoModelForCausalLM.from_config(config)
    assert fresh(IDS).logits.isfinite().all()
    assert not torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_special_tokens_and_generation_defaults_go_both_ways(saved: Path, tmp_path: Path) -> None:
    model = TandemForCausalLM.from_pretrained(saved)
    assert model.decoder.token_ids == TokenIds(bos=1, eos=(2, 3), pad=0)
    assert model.generation_config.eos_token_id == [2, 3]
    model.config.pad_token_id = 5
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=2, pad_token_id=5)
    model.save_pretrained(tmp_path)
    again = TandemForCausalLM.from_pretrained(tmp_path)
    assert (again.generation_config.temperature, again.config.pad_token_id) == (0.5, 5)
    assert load_model(tmp_path).token_ids == TokenIds(bos=1, eos=(2,), pad=5)


def test_weights_take_the_dtype_that_is_asked_for(saved: Path, tmp_path: Path) -> None:
    assert TandemForCausalLM.from_pretrained(saved).dtype == torch.float32
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert (half.dtype, half.config.dtype) == (torch.bfloat16, torch.bfloat16)
    assert TandemForCausalLM.from_pretrained(saved, torch_dtype="float16", device_map="cpu").dtype == torch.float16
    half.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert TandemForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


def test_fields_of_the_configuration_can_be_set(saved: Path) -> None:
    for cls in (TandemForCausalLM, AutoModelForCausalLM):
        model = cls.from_pretrained(saved, use_cache=False, pad_token_id=7, attn_implementation="sdpa", revision="main")
        assert (model.config.use_cache, model.config.pad_token_id) == (False, 7)
        assert model.model.config is model.config


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_cash": False}, "use_cash"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"device_map": {"model": "cpu", "lm_head": "cpu"}}, "device_map"),
        ({"dtype": "int4"}, "dtype"),
        ({"config": TandemConfig(spec={**SPEC.to_json(), "vocab_size": 41})}, "config"),
    ],
)
def test_arguments_that_would_be_lost_are_refused(saved: Path, options: dict[str, object], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        TandemForCausalLM.from_pretrained(saved, **options)


def test_saving_refuses_what_it_does_not_do(saved: Path, tmp_path: Path) -> None:
    model = TandemForCausalLM.from_pretrained(saved)
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"max_shard_size": "many"}):
        with pytest.raises(SpecError, match=next(iter(options))):
            model.save_pretrained(tmp_path / "new", **options)
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", ["5GB", "1KB", 3000])
def test_a_trainer_resumes_from_files_of_any_size(saved: Path, tmp_path: Path, size: int | str) -> None:
    trained = TandemForCausalLM.from_decoder(build(SPEC, seed=1))
    trained.save_pretrained(tmp_path, state_dict=trained.state_dict(), max_shard_size=size)
    parts = shards(tmp_path)
    assert (len(parts) == 1) == (size == "5GB")
    model = TandemForCausalLM.from_pretrained(saved)
    for part in parts:
        assert not model.load_state_dict(part, strict=False).unexpected_keys
    assert torch.equal(model(IDS).logits, trained(IDS).logits)


def test_the_state_dict_that_is_given_is_written(saved: Path, tmp_path: Path) -> None:
    model, other = TandemForCausalLM.from_pretrained(saved), TandemForCausalLM.from_decoder(build(SPEC, seed=1))
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(load_model(tmp_path)(IDS), other(IDS).logits)


@pytest.mark.parametrize("training", [True, False])
def test_saving_leaves_the_mode_as_it_is(saved: Path, tmp_path: Path, training: bool) -> None:
    model = TandemForCausalLM.from_pretrained(saved).train(training)
    model.model.save_pretrained(tmp_path)
    assert {module.training for module in model.modules()} == {training}


def test_the_model_without_its_head_is_saved_with_it(saved: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(IDS), load_model(saved)(IDS))


def test_a_configuration_without_a_specification_says_so() -> None:
    with pytest.raises(SpecError, match="spec"):
        TandemForCausalLM(TandemConfig())


def test_models_are_built_in_the_dtype_of_the_context(saved: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert isinstance(model.decoder, Decoder)
