"""The chat format to the letter, the same in transformers, and in what is saved with a model."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from chat_cases import TOOLS, base_tokenizer, chat_tokenizer, conversations, learnable, smuggled, spoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tandem import load_model, save_model
from tandem.align.chat import (
    answer_text,
    end_id,
    make_chat_model,
    nano2_template,
    prompt_pieces,
    render,
    save_chat_tokenizer,
    segments,
)
from tandem.align.encode import encode_sample
from tandem.align.sample import Sample
from tandem.model.hybrid import Decoder, TokenIds
from tandem.model.tokenizer import Tokenizer, load_tokenizer, render_template
from tandem.spec.errors import SpecError
from tandem.spec.mixers import MLP, Attention, Mamba2
from tandem.spec.model import ModelSpec
from tandem.train.data.bpe import save_tokenizer

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
ASKED = {"role": "user", "content": "Why?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer(found)
    return found / "chat"


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


# --- to the letter ---


@pytest.mark.parametrize(
    ("messages", "given", "text"),
    [
        ([ASKED], {}, "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think>\n"),
        (
            [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  Why? "}],
            {"add_generation_prompt": False},
            "<SPECIAL_10>System\nBe brief.\n\n<SPECIAL_11>User\nWhy?\n",
        ),
        (
            [ASKED],
            {"enable_thinking": False},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think></think>",
        ),
        (
            [{"role": "user", "content": "Why? /no_think"}],
            {"enable_thinking": True},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think></think>",
        ),
        (
            [{"role": "system", "content": "/no_think"}, {"role": "user", "content": "/think Why?"}],
            {},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think>\n",
        ),
        (  # a closing mark is no toggle
            [{"role": "user", "content": "What is </think>? /no_think Not </think>."}],
            {},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhat is </think>?  Not </think>.\n"
            "<SPECIAL_11>Assistant\n<think></think>",
        ),
        (  # thoughts of earlier turns are left out, those since the last user message are not
            [
                ASKED,
                {"role": "assistant", "content": "So.", "reasoning_content": "hm"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": " Yes. ", "reasoning_content": " 1\n2\n"},
            ],
            {"add_generation_prompt": False},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\nSo.\n<SPECIAL_12>\n"
            "<SPECIAL_11>User\nSure?\n<SPECIAL_11>Assistant\n<think>\n1\n2\n</think>\n\nYes.\n<SPECIAL_12>\n",
        ),
        (
            [ASKED, {"role": "assistant", "content": "So.", "reasoning_content": "hm"}],
            {"add_generation_prompt": False, "enable_thinking": False},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think></think>So.\n<SPECIAL_12>\n",
        ),
        (  # no thought at all: what a budget of 0 leaves
            [ASKED, {"role": "assistant", "content": "So.", "reasoning_content": " "}],
            {"add_generation_prompt": False},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think>\n</think>\n\nSo.\n<SPECIAL_12>\n",
        ),
        (  # what clients do who keep thoughts within the text, or leave them out
            [ASKED, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo."}, {"role": "assistant", "content": None}],
            {"add_generation_prompt": False},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\nSo.\n<SPECIAL_12>\n"
            "<SPECIAL_11>Assistant\n\n<SPECIAL_12>\n",
        ),
        (  # calls, their results, and going on from there
            [
                ASKED,
                {"role": "assistant", "content": "I ask.", "reasoning_content": "hm", "tool_calls": [CALL, CALL["function"]]},
                {"role": "tool", "content": "2"},
                {"role": "tool", "content": '{"b": 3}'},
                {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": '{"a":  1}'}}]},
                {"role": "tool", "content": ""},
            ],
            {},
            "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think>\nhm\n</think>\n\nI ask.\n\n"
            '<TOOLCALL>[{"name": "f", "arguments": {"a": "é"}}, {"name": "f", "arguments": {"a": "é"}}]</TOOLCALL>\n'
            "<SPECIAL_12>\n"
            '<SPECIAL_11>User\n<TOOL_RESPONSE>[2, {"b": 3}]</TOOL_RESPONSE>\n'
            '<SPECIAL_11>Assistant\n<TOOLCALL>[{"name": "g", "arguments": {"a":  1}}]</TOOLCALL>\n<SPECIAL_12>\n'
            "<SPECIAL_11>User\n<TOOL_RESPONSE>[]</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think>\n",
        ),
        ([], {}, "<SPECIAL_10>System\n\n\n<SPECIAL_11>Assistant\n<think>\n"),
    ],
)
def test_to_the_letter(messages: list[dict[str, Any]], given: dict[str, Any], text: str) -> None:
    assert render(messages, **given) == text


def test_tools_to_the_letter() -> None:
    tools = """\
You can use the following tools to assist the user if required:
<AVAILABLE_TOOLS>[{"name": "f", "description": "é", "parameters": {"type": "object"}}, \
{"name": "g", "parameters": {"type": "object", "properties": {"a": {}}}}]</AVAILABLE_TOOLS>

If you decide to call any tool(s), use the following format:
<TOOLCALL>[{"name": "tool_name1", "arguments": "tool_args1"}, {"name": "tool_name2", "arguments": "tool_args2"}]</TOOLCALL>

The user will execute tool-calls and return responses from tool(s) in this format:
<TOOL_RESPONSE>[{"tool_response1"}, {"tool_response2"}]</TOOL_RESPONSE>

Based on the tool responses, you can call additional tools if needed, correct tool calls if any errors are found, or just \
respond to the user."""
    end = "\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think>\n"
    assert render([ASKED], tools=TOOLS) == f"<SPECIAL_10>System\n{tools}{end}"
    system = {"role": "system", "content": "Be brief."}
    assert render([system, ASKED], tools=TOOLS) == f"<SPECIAL_10>System\nBe brief.\n\n{tools}{end}"


@pytest.mark.parametrize("role", ["system", "developer", "function", ""])
def test_roles_without_a_place_are_refused(role: str) -> None:
    with pytest.raises(SpecError, match=rf'^messages\[1\]\.role="{role}": must be user, assistant or tool'):
        render([ASKED, {"role": role, "content": "b"}])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant"]),
            st.lists(st.sampled_from(["/think", "/no_think", "x", "</think>"])),
        )
    )
)
def test_the_last_toggle_of_a_system_or_user_message_decides(turns: list[tuple[str, list[str]]]) -> None:
    said = [word for role, words in turns if role != "assistant" for word in words if word.endswith("/think") or "_" in word]
    thinking = not said or said[-1] == "/think"
    roles = ["user" if i and role == "system" else role for i, (role, _) in enumerate(turns)]
    messages = [{"role": role, "content": " ".join(words)} for role, (_, words) in zip(roles, turns, strict=True)]
    text = render(messages)
    assert text.endswith("<think>\n" if thinking else "<think></think>")
    assert render(messages, enable_thinking=False).endswith("<think></think>")
    for part in text.split("<SPECIAL_11>User")[1:]:
        assert "/think" not in part.split("<SPECIAL_11>")[0].replace("</think>", "").replace("/no_think", "/think")


# --- in transformers ---


def theirs_text(theirs: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **given: Any) -> str:
    return theirs.apply_chat_template(messages, tokenize=False, **given)


@settings(deadline=None, max_examples=60)
@given(
    messages=conversations(said=spoken | smuggled),
    tools=st.sampled_from([(), TOOLS]),
    enable=st.sampled_from([None, False, True]),
    prompt=st.booleans(),
)
def test_transformers_renders_the_same(
    ours: Tokenizer,
    theirs: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: tuple[Any, ...],
    enable: bool | None,
    prompt: bool,
) -> None:
    given = {} if enable is None else {"enable_thinking": enable}
    text = theirs_text(theirs, messages, tools=list(tools) or None, add_generation_prompt=prompt, **given)
    assert render(messages, tools=tools, enable_thinking=enable, add_generation_prompt=prompt) == text
    assert ours.chat(messages, tools=list(tools) or None, add_generation_prompt=prompt, **given) == text
    parts = segments(messages, tools=tools, enable_thinking=enable, add_generation_prompt=prompt, tokenizer=ours)
    assert "".join(part.text for part in parts) == text
    if prompt:
        assert "".join(prompt_pieces(ours, messages, tools=tools, enable_thinking=enable)) == text


@settings(deadline=None, max_examples=60)
@given(sample=learnable())
def test_transformers_masks_the_same_tokens_of_the_turns_that_are_learned(
    ours: Tokenizer, theirs: PreTrainedTokenizerFast, sample: Sample
) -> None:
    given = {} if sample.thinking else {"enable_thinking": False}
    found = theirs.apply_chat_template(
        list(sample.messages),
        tools=list(sample.tools) or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **given,
    )
    ids, learned = encode_sample(sample, ours)
    assert list(ids) == found["input_ids"]
    first = learned.index(True)
    assert list(map(int, learned))[first:] == found["assistant_masks"][first:]
    last_user = max(i for i, message in enumerate(sample.messages) if message["role"] == "user")
    earlier = [run for flag, run in groupby(found["assistant_masks"][:first]) if flag]
    assert len(earlier) == sum(message["role"] == "assistant" for message in sample.messages[:last_user])


@pytest.mark.slow
def test_trl_takes_the_template_for_training_as_it_is(theirs: PreTrainedTokenizerFast) -> None:
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    assert has_generation_markers(theirs.chat_template)
    assert is_chat_template_stop_token_trained(theirs)
    assert get_training_chat_template(theirs) is None


def test_the_mark_of_generation_changes_nothing_by_itself() -> None:
    template = "{% set x = 1 %}a{% generation %}{% set y = 2 %}{{ x }}{% endgeneration %}b"
    assert render_template(template) == "a1b"
    assert render_template(template, generation_begin="[", generation_end="]") == "a[1]b"


# --- what a model writes ---


def test_what_follows_the_prompt_is_what_is_learned() -> None:
    message = {"role": "assistant", "content": "So.", "reasoning_content": "hm", "tool_calls": [CALL]}
    call = '<TOOLCALL>[{"name": "f", "arguments": {"a": "é"}}]</TOOLCALL>\n'
    assert answer_text(message) == f"hm\n</think>\n\nSo.\n\n{call}"
    assert answer_text(message, thinking=False) == f"So.\n\n{call}"
    for thinking, enable in ((True, None), (False, False)):
        whole = render([ASKED, message], enable_thinking=enable, add_generation_prompt=False)
        assert whole == f"{render([ASKED], enable_thinking=enable)}{answer_text(message, thinking=thinking)}<SPECIAL_12>\n"


@pytest.mark.parametrize("value", ["\ud800", 2**70, 1e300])
def test_arguments_of_calls_are_json_that_can_be_encoded(value: object) -> None:
    text = answer_text({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": value}}]}, thinking=False)
    text.encode()
    assert json.loads(text.removeprefix("<TOOLCALL>").removesuffix("</TOOLCALL>\n")) == [
        {"name": "f", "arguments": {"a": value}}
    ]


# --- tokenizers and models ---


def test_a_chat_tokenizer_is_read_by_transformers_and_by_this_project(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.template == theirs.chat_template == nano2_template()
    assert ours.special["eos_token"] == theirs.eos_token == "<SPECIAL_12>"
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token) == (12, 0, "<s>")
    assert end_id(ours) == 12


def test_another_template_in_the_settings_is_replaced(tmp_path: Path) -> None:
    save_tokenizer(base_tokenizer(), tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "other"}))
    assert save_chat_tokenizer(tmp_path, tmp_path / "chat").template == nano2_template()
    assert "chat_template" not in json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())


def test_a_tokenizer_without_the_end_mark_is_refused(tmp_path: Path) -> None:
    content = json.loads(base_tokenizer().backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<SPECIAL_12>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"^tokenizer: has no special token <SPECIAL_12>"):
        save_chat_tokenizer(tmp_path, tmp_path / "chat")
    assert not (tmp_path / "chat").exists()


def test_a_chat_model_is_saved_with_its_end_and_its_template(tmp_path: Path) -> None:
    mixers = (
        Mamba2(num_heads=2, head_dim=4, state_dim=4, groups=1),
        Attention(num_heads=2, num_kv_heads=1, head_dim=4),
        MLP(ffn_size=8, gated=True),
    )
    decoder = Decoder(
        ModelSpec(name="tiny", vocab_size=320, hidden_size=8, layers=mixers), token_ids=TokenIds(bos=1, eos=(2,), pad=0)
    )
    with pytest.raises(SpecError, match=r"^decoder\.source=None"):
        make_chat_model(decoder, tmp_path / "chat")
    save_tokenizer(base_tokenizer(), tmp_path / "base")
    decoder.source = tmp_path / "base"
    make_chat_model(decoder, tmp_path / "chat")
    save_model(decoder, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.token_ids == TokenIds(bos=1, eos=(12,), pad=0)
    assert load_tokenizer(tmp_path / "model").template == nano2_template()
    stated = [
        json.loads((tmp_path / "model" / f).read_text())["eos_token_id"] for f in ("config.json", "generation_config.json")
    ]
    assert stated == [12, 12]
