"""PEFT's LoRA over the adapter: trained, used by generate, saved, loaded, merged."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from specs import build, tokens
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from tandem.model.hf import TandemForCausalLM
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec, Rope

# PEFT asks by names that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?(gradient_checkpointing|past_key_values)\w*:FutureWarning")
SPEC = ModelSpec(
    name="small",
    vocab_size=40,
    hidden_size=16,
    layers=(
        Mamba2(num_heads=2, head_dim=8, state_dim=4, groups=1),
        Attention(num_heads=2, num_kv_heads=1, head_dim=8, rope=Rope(theta=100.0)),
        MLP(ffn_size=24, gated=True),
    ),
)
IDS = tokens(SPEC, 2, 7)
MERGED = 1e-4
"""Largest difference of logits: the sum of two products against the product of a sum, with adapters as large as weights."""
TARGETS = [["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"]


def trained(targets: object, base: TandemForCausalLM | None = None, **options: object) -> PeftModel:
    """The model with adapters after two large steps."""
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base or TandemForCausalLM.from_decoder(build(SPEC)), config)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    return model.eval()


def greedy(model: torch.nn.Module, **options: object) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_learn_and_merge(targets: object) -> None:
    model = trained(targets)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, build(SPEC)(IDS))
    adapted, text = model(IDS).logits, greedy(model)
    assert (adapted - build(SPEC)(IDS)).abs().max() > 0.1
    assert torch.equal(text, greedy(model, use_cache=False))
    merged = model.merge_and_unload()
    assert isinstance(merged, TandemForCausalLM)
    assert (merged(IDS).logits - adapted).abs().max() < MERGED
    assert torch.equal(greedy(merged), text)
    assert torch.equal(merged.decoder(IDS), merged(IDS).logits)


def test_all_linear_reaches_every_projection_but_the_head() -> None:
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in trained("all-linear").named_parameters() if "lora" in name
    }
    assert {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= adapted
    assert "lm_head" not in adapted


def test_modules_that_are_trained_whole_are_those_of_the_decoder() -> None:
    model = trained(["q_proj"], modules_to_save=["lm_head", "embeddings"])
    merged_logits = model(IDS).logits
    assert torch.equal(greedy(model), greedy(model, use_cache=False))
    merged = model.merge_and_unload()
    assert (merged(IDS).logits - merged_logits).abs().max() < MERGED
    assert (merged.decoder(IDS) - merged_logits).abs().max() < MERGED


def test_an_adapter_is_saved_and_found_with_its_base(tmp_path: Path) -> None:
    TandemForCausalLM.from_decoder(build(SPEC)).save_pretrained(tmp_path / "base")
    model = trained("all-linear", TandemForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    wanted = model(IDS).logits
    base = TandemForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(IDS).logits, wanted)
    for cls in (AutoModelForCausalLM, TandemForCausalLM):
        assert torch.equal(cls.from_pretrained(tmp_path / "adapter")(IDS).logits, wanted)


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers asks for {MIN_PEFT_VERSION}")
def test_a_model_with_an_adapter_saves_the_adapter_alone(tmp_path: Path) -> None:
    TandemForCausalLM.from_decoder(build(SPEC)).save_pretrained(tmp_path / "base")
    trained(["q_proj"], TandemForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    model = TandemForCausalLM.from_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    again = TandemForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(greedy(again), greedy(again, use_cache=False))
