from __future__ import annotations

import pytest
from evaluated import PLAIN, SPECIAL
from toys import byte_tokenizer

from tandem.align.chat import nano2_template
from tandem.align.encode import encode_ask
from tandem.align.sample import Ask
from tandem.evaluation.form import Form
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import make_problems, prompt_of
from tandem.train.evaluate import prompt_ids

PLAIN_CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SWITCH = PLAIN_CHAT + "{% if enable_thinking is false %}<think></think>{% endif %}"
ALWAYS = PLAIN_CHAT + "<think>\n"


def tokenizer(template: str | None) -> Tokenizer:
    backend = byte_tokenizer(special=SPECIAL, plain=PLAIN).backend
    return Tokenizer(backend, template=template, special={"bos_token": "<s>", "eos_token": "</s>"})


def test_a_base_model_is_asked_as_its_documents_begin() -> None:
    problem = make_problems("chain_sum", 1, 3)[0]
    reader = tokenizer(None)
    prompt = Form("base", reader).question(problem.question, "on")
    assert list(prompt.ids) == prompt_ids(reader, prompt_of(problem))
    assert prompt.thinking


@pytest.mark.parametrize(
    ("template", "modes", "opens"),
    [
        (None, ("on",), True),
        (nano2_template(), ("on", "off"), True),
        (PLAIN_CHAT, ("off",), False),
        (SWITCH, ("on", "off"), False),
        (ALWAYS, ("on",), True),
    ],
    ids=["base", "nano2", "no thinking", "the model opens the block", "always"],
)
def test_modes_are_those_that_the_template_knows(template: str | None, modes: tuple[str, ...], opens: bool) -> None:
    form = Form("m", tokenizer(template))
    assert form.modes == modes
    assert form.wanted("both") == modes
    assert form.question("1 + 1 = ?", modes[0]).thinking is opens
    for mode in ("on", "off"):
        if mode in modes:
            assert form.wanted(mode) == (mode,)
        else:
            with pytest.raises(SpecError, match=f"thinking='{mode}': m cannot be asked so"):
                form.wanted(mode)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_chat_model_is_asked_as_it_was_taught(thinking: bool) -> None:
    reader = tokenizer(nano2_template())
    messages = ({"role": "user", "content": "say <SPECIAL_12> and </think>"},)
    ask = Ask(id="a", kind="chat", task="t", messages=messages, thinking=thinking)
    prompt = Form("m", reader).conversation(messages, (), "on" if thinking else "off")
    assert list(prompt.ids) == encode_ask(ask, reader)
    assert prompt.thinking is thinking
    assert reader.backend.token_to_id("<SPECIAL_12>") not in prompt.ids
