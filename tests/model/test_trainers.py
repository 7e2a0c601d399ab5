"""TRL's trainers over the adapter on a CPU: a few steps each, finite losses, and every parameter moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import build
from toy_tokenizer import toy_tokenizer

from tandem.model.hf import TandemForCausalLM
from tandem.spec.model import MLP, Attention, Mamba2, ModelSpec

pytest.importorskip("trl", reason="pip install tandem-lm[train]")
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

# TRL and PEFT still use names of settings that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
disable_progress_bars()
TOKENIZER = toy_tokenizer()
SPEC = ModelSpec(
    name="small",
    vocab_size=len(TOKENIZER),
    hidden_size=16,
    layers=(
        Mamba2(num_heads=2, head_dim=8, state_dim=4, groups=1),
        Attention(num_heads=2, num_kv_heads=1, head_dim=8),
        MLP(ffn_size=32, gated=False),
    ),
)
STEPS = 2
TEXTS = Dataset.from_dict({"text": ["hello " + "x" * i for i in range(12)]})
PAIRS = Dataset.from_dict({"prompt": [f"what is {i}?" for i in range(12)], "completion": ["y" * (i + 1) for i in range(12)]})
CHOICES = Dataset.from_dict({"prompt": PAIRS["prompt"], "chosen": [" good"] * 12, "rejected": [" very bad"] * 12})
PROMPTS = PAIRS.select_columns(["prompt"])


@pytest.fixture
def model(tmp_path: Path) -> TandemForCausalLM:
    """A model out of a folder, where a trainer finds its reference again."""
    TandemForCausalLM.from_decoder(build(SPEC)).save_pretrained(tmp_path / "model")
    return TandemForCausalLM.from_pretrained(tmp_path / "model")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,  # TRL's default is autocast to bf16, which few CPUs compute fast
        "disable_tqdm": True,
    }


def distinct(completions: list[str], **_: object) -> list[float]:
    """A reward that differs between samples: how many different letters."""
    return [float(len(set(text))) for text in completions]


def run(trainer: Any, model: TandemForCausalLM) -> list[float]:
    """Losses of the steps; the trainer's weights are those of the model's decoder, and they moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(float(loss)) for loss in losses)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name]) and p.requires_grad]
    assert not still
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.decoder.parameters()}
    return [float(loss) for loss in losses]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        pytest.param(TEXTS, {}, id="text"),
        pytest.param(PAIRS, {}, id="completion only"),
        pytest.param(TEXTS, {"packing": True, "max_length": 64}, id="packed"),
        pytest.param(TEXTS, {"padding_free": True, "max_length": None}, id="padding-free"),
        pytest.param(TEXTS, {"bf16": True}, id="autocast to bf16"),
    ],
)
def test_sft_trains(model: TandemForCausalLM, settings: dict[str, Any], data: Dataset, options: dict[str, Any]) -> None:
    args = SFTConfig(**{"max_length": 32, **settings, **options})
    assert args.gradient_checkpointing  # TRL's default
    run(SFTTrainer(model, args=args, train_dataset=data, processing_class=TOKENIZER), model)


def test_packed_rows_cost_what_their_documents_cost(model: TandemForCausalLM, settings: dict[str, Any]) -> None:
    losses = []
    for options in ({}, {"padding_free": True, "max_length": None}):
        args = SFTConfig(**{"max_length": 32, **settings, **options, "per_device_train_batch_size": 4})
        trainer = SFTTrainer(model, args=args, train_dataset=TEXTS.select(range(4)), processing_class=TOKENIZER)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("position_ids" in batch) == bool(options)
        losses.append(trainer.compute_loss(model, dict(batch)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_sft_trains_an_adapter_alone(model: TandemForCausalLM, settings: dict[str, Any]) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = SFTConfig(max_length=32, **settings)
    trainer = SFTTrainer(model, args=args, train_dataset=TEXTS, processing_class=TOKENIZER, peft_config=lora)
    trainer.train()
    after = dict(trainer.model.merge_and_unload().named_parameters())
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_sft_resumes_from_its_checkpoint(model: TandemForCausalLM, settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"save_strategy": "steps", "save_steps": 1, "max_length": 32}
    whole = SFTTrainer(model, args=SFTConfig(**settings), train_dataset=TEXTS, processing_class=TOKENIZER)
    whole.train()
    other = TandemForCausalLM.from_decoder(build(SPEC, seed=1))
    resumed = SFTTrainer(other, args=SFTConfig(**settings), train_dataset=TEXTS, processing_class=TOKENIZER)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, parameter in model.named_parameters():
        assert torch.allclose(other.get_parameter(name), parameter, atol=1e-6), name


def test_dpo_trains(model: TandemForCausalLM, settings: dict[str, Any]) -> None:
    trainer = DPOTrainer(model, args=DPOConfig(**settings), train_dataset=CHOICES, processing_class=TOKENIZER)
    assert isinstance(trainer.ref_model, TandemForCausalLM)
    first, *_ = run(trainer, model)
    assert first == pytest.approx(math.log(2), abs=1e-3)  # policy and reference agree


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_trains(model: TandemForCausalLM, settings: dict[str, Any], beta: float) -> None:
    args = GRPOConfig(**settings, beta=beta, num_generations=2, max_completion_length=6)
    rewards: Callable[..., list[float]] = distinct
    trainer = GRPOTrainer(model, rewards, args=args, train_dataset=PROMPTS, processing_class=TOKENIZER)
    assert isinstance(trainer.ref_model, TandemForCausalLM) == (beta > 0)
    run(trainer, model)
