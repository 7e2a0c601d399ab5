"""Checkpoints: the hub's formats both ways to the bit, our own where they end, streaming, and folders that are never half."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tandem.model.config_out import hub_format
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, save_model
from tandem.model.naming import FORMATS, stored_tensors
from tandem.spec.catalog import load_spec
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2, Mixer, MoE, Rope
from tandem.spec.model import ModelSpec

ROPE = Rope(theta=10000.0)
LLAMA3 = Rope(theta=5e5, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192)
MAMBA = Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2)
PLAIN = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
RELU2 = MLP(ffn_size=48, gated=False)
SWIGLU = MLP(ffn_size=40, gated=True)
EXPERTS = MoE(
    num_experts=4, top_k=2, ffn_size=24, gated=False, shared_ffn_size=40, router_bias=True, score="sigmoid", score_scale=2.5
)


def spec_of(*layers: Mixer, tied: bool = False, **fields: object) -> ModelSpec:
    return ModelSpec(name="tiny", vocab_size=96, hidden_size=32, layers=layers, tied_embeddings=tied, max_context=512, **fields)  # type: ignore[arg-type]


NEMOTRON = spec_of(MAMBA, RELU2, PLAIN, EXPERTS, MAMBA)
LATENT = spec_of(replace(EXPERTS, latent_size=16), PLAIN, norm_eps=1e-6)
LLAMA = spec_of(*(replace(PLAIN, rope=ROPE), SWIGLU) * 2, norm_eps=1e-6)
LLAMA_TIED = spec_of(*(replace(PLAIN, rope=LLAMA3, qkv_bias=True, out_bias=True), replace(SWIGLU, bias=True)) * 2, tied=True)
QWEN3 = spec_of(*(replace(PLAIN, rope=ROPE, qk_norm="head"), SWIGLU) * 2)
QWEN3_TIED = replace(QWEN3, tied_embeddings=True)
MIXED = spec_of(MAMBA, replace(PLAIN, rope=ROPE, qkv_bias=True), SWIGLU, RELU2, replace(MAMBA, num_heads=8), tied=True)
HUB = {
    "nemotron_h": NEMOTRON, "nemotron_h latent": LATENT, "llama": LLAMA, "llama tied": LLAMA_TIED,
    "qwen3": QWEN3, "qwen3 tied": QWEN3_TIED,
}  # fmt: skip
ENDS = TokenIds(bos=1, eos=(2, 5), pad=0)


def decoder(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(spec, dtype=dtype, seed=3, token_ids=ENDS).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape))
    return model


def assert_same(a: Decoder, b: Decoder) -> None:
    assert a.spec == replace(b.spec, name=a.spec.name)
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def logits_differ(a: Decoder, b: PreTrainedModel) -> float:
    tokens = torch.arange(2 * 9).view(2, 9) * 5 % 96
    for layer in b.model.layers:
        if hasattr(getattr(layer, "mixer", None), "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        return float((a(tokens) - b(tokens).logits).abs().max())


@pytest.mark.parametrize("spec", HUB.values(), ids=HUB)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(
    spec: ModelSpec, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours = decoder(spec, dtype)
    save_model(ours, tmp_path / "ours", max_shard_bytes=20_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    if dtype == torch.float32:
        assert logits_differ(ours, theirs) < 1e-5
    if hub_format(spec) == "nemotron_h":
        own = ours.state_dict()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, own[name.replace("model.", "backbone.", 1)].to(tensor.dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    again = load_model(tmp_path / "theirs", dtype=str(dtype).removeprefix("torch."))
    assert again.token_ids == ENDS
    if dtype == torch.bfloat16:  # transformers keeps a router in fp32, and so do we
        for name, parameter in ours.named_parameters():
            if name.endswith("mixer.gate.weight"):
                parameter.data = parameter.data.float()
    assert_same(ours, again)


@pytest.mark.parametrize("spec", [*HUB.values(), MIXED], ids=[*HUB, "tandem"])
def test_what_was_saved_is_loaded_to_the_bit(spec: ModelSpec, tmp_path: Path) -> None:
    ours = decoder(spec)
    save_model(ours, tmp_path)
    assert load_spec(tmp_path) == replace(spec, name=load_spec(tmp_path).name)
    again = load_model(tmp_path)
    assert_same(ours, again)
    assert again.token_ids == ENDS
    assert not any(parameter.is_meta for parameter in again.parameters())
    tokens = torch.arange(7)[None]
    assert torch.equal(ours(tokens), again(tokens))


def test_a_model_that_no_format_of_the_hub_can_say_is_saved_in_ours(tmp_path: Path) -> None:
    save_model(decoder(MIXED), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "tandem"
    assert ModelSpec.from_json(config["spec"]) == MIXED


def test_a_head_that_the_file_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = decoder(LLAMA_TIED)
    model.lm_head.weight = nn.Parameter(model.backbone.embeddings.weight.detach().clone())
    save_model(model, tmp_path / "equal")
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
    with pytest.raises(SpecError, match=r"tied_embeddings=True: lm_head.weight is not the embedding"):
        save_model(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_of_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"backbone\.embeddings\.weight is torch\.float64: not in a 16- or 32-bit float format"):
        save_model(decoder(LLAMA).double(), tmp_path / "double")


def test_a_dtype_of_torch_is_a_dtype(tmp_path: Path) -> None:
    save_model(decoder(LLAMA), tmp_path / "model")
    assert load_model(tmp_path / "model", dtype=torch.float16).lm_head.weight.dtype == torch.float16
    with pytest.raises(SpecError, match="dtype='float64': must be one of auto, float32"):
        load_model(tmp_path / "model", dtype=torch.float64)


def test_tied_embeddings_are_stored_once_and_shared_when_loaded(tmp_path: Path) -> None:
    save_model(decoder(LLAMA_TIED), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert again.lm_head.weight is again.backbone.embeddings.weight


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    ours = decoder(NEMOTRON)
    save_model(ours, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {stored.name for stored in stored_tensors(NEMOTRON, "nemotron_h")}
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    total = 0
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == shard for name in file.keys())  # noqa: SIM118
        tensors = load_file(tmp_path / shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert torch.equal(
        load_file(tmp_path / index["weight_map"]["backbone.layers.3.mixer.experts.2.up_proj.weight"])[
            "backbone.layers.3.mixer.experts.2.up_proj.weight"
        ],
        ours.state_dict()["backbone.layers.3.mixer.experts.up_proj"][2],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(decoder(LLAMA), tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Rewrites the weights with some tensors replaced, added, or taken away (None)."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight"),
        (
            {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)},
            r"holds model\.layers\.9\.mlp\.up_proj\.weight, which the model",
        ),
        ({"model.norm.weight": torch.zeros(33)}, r"model\.norm\.weight is \[33\], must be \[32\]"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, r"backbone|model\.norm\.weight is stored as I8"),
        ({f"x{i}": torch.zeros(1) for i in range(5)}, "x0, x1, x2 and 2 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    changed(folder, change)
    with pytest.raises(SpecError, match=message) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_tensors_that_transformers_leaves_aside_are_left_aside(folder: Path) -> None:
    before = load_model(folder)
    changed(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "mtp.layers.0.weight": torch.zeros(3)})
    assert_same(before, load_model(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "not a whole safetensors file"),
        ("model.safetensors", b"\xff" * 64, "not a whole safetensors file"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "not a whole safetensors file"),
        ("model.safetensors.index.json", b"{}", "not an index"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}', "not in this folder"),
        ("config.json", b'{"model_type": "bert"}', "model_type='bert'"),
        ("config.json", b"{", "not JSON"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        load_model(folder)


def test_a_file_that_is_cut_short_is_refused_before_it_is_read(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SpecError, match="is cut short"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("qwen3-8b", "its weights are not here"), ("nosuch", "unknown name"), ("/", "holds no config.json")],
)
def test_names_without_weights_are_refused(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_model(name)


def test_a_dtype_changes_all_but_what_must_not_be_rounded(tmp_path: Path) -> None:
    save_model(decoder(NEMOTRON), tmp_path)
    kept = (".A_log", ".D", ".dt_bias", ".mixer.gate.weight", ".e_score_correction_bias")
    exact = load_model(tmp_path, dtype="auto")
    for name in ("float16", "bfloat16"):
        for parameter, tensor in load_model(tmp_path, dtype=name).state_dict().items():
            wanted = torch.float32 if parameter.endswith(kept) else getattr(torch, name)
            assert tensor.dtype == wanted, parameter
            assert torch.equal(tensor, exact.state_dict()[parameter].to(wanted))
    with pytest.raises(SpecError, match="dtype='fp7'"):
        load_model(tmp_path, dtype="fp7")


def test_an_old_checkpoint_gives_way_whole_and_other_files_stay(tmp_path: Path) -> None:
    save_model(decoder(NEMOTRON), tmp_path, max_shard_bytes=20_000)
    (tmp_path / "notes.txt").write_text("mine")
    save_model(decoder(LLAMA), tmp_path)
    assert_same(decoder(LLAMA), load_model(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    }  # fmt: skip


def test_a_model_is_saved_over_the_folder_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(decoder(LLAMA), tmp_path)
    save_model(load_model(tmp_path, dtype="bfloat16"), tmp_path)
    assert load_model(tmp_path, dtype="auto").backbone.norm_f.weight.dtype == torch.bfloat16
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_half_written_stays_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    target = tmp_path / "model"
    if exists:
        save_model(decoder(LLAMA), target)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tandem.model.load.write_config", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(decoder(NEMOTRON), target)
    assert list(tmp_path.iterdir()) == ([target] if exists else [])
    if exists:
        assert_same(decoder(LLAMA), load_model(target))


def test_a_file_is_no_folder_to_save_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is a file"):
        save_model(decoder(LLAMA), tmp_path / "file")


PEAK = """
import sys
import tandem.model.gguf
from tandem.model.load import load_model, save_model

def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

load_model(sys.argv[2], dtype=sys.argv[4])  # a small one first: torch loads some of its parts late
before = peak()
model = load_model(sys.argv[1], dtype=sys.argv[4])
loaded = peak()
save_model(model, sys.argv[3])
print(before, loaded, peak(), sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    block = (Attention(num_heads=8, num_kv_heads=8, head_dim=64, rope=ROPE), MLP(ffn_size=2048, gated=True))
    spec = ModelSpec(name="wide", vocab_size=16384, hidden_size=512, layers=block * 8, tied_embeddings=True)
    folder = tmp_path_factory.mktemp("wide")
    model = Decoder(spec, device="meta").to_empty(device="cpu")
    with torch.no_grad():  # memory that was used before holds anything, and this head is no longer the embedding itself
        for tensor in model.parameters():
            tensor.zero_()
    save_model(model, folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_are_in_memory_once_while_loading_and_saving(dtype: str, wide: Path, tmp_path: Path) -> None:
    save_model(decoder(LLAMA), tmp_path / "small")
    command = [sys.executable, "-c", PEAK, str(wide), str(tmp_path / "small"), str(tmp_path / "copy"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, loaded, saved, weights = map(int, done.stdout.split())
    assert weights > 80e6
    assert loaded - before < 1.25 * weights
    assert saved - loaded < 0.1 * weights


def test_formats_are_four() -> None:
    assert FORMATS == ("nemotron_h", "llama", "qwen3", "tandem")
    assert {hub_format(spec) for spec in [*HUB.values(), MIXED]} == set(FORMATS)
    assert [hub_format(load_spec(name)) for name in ("nano-9b-v2", "llama-3.1-8b", "qwen3-8b")] == list(FORMATS[:3])
