"""What a model wrote after the prompt, read whole: thoughts, answer, calls, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tandem.align.parsers import CLOSE, NANO2, OPEN, SPACE, ReasoningParser, ToolParser
from tandem.align.sample import Answer, Call
from tandem.model.tokenizer import Tokenizer


def hidden_token(ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """The first token of a turn (its end mark left out) that decoding leaves out of the text; None where there is none.

    Such are special tokens, and ids beyond the vocabulary. A text is all that was written only where none is there.
    """
    special = {id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    for id in ids:
        name = tokenizer.backend.id_to_token(id)
        if name is None or id in special:
            return name or str(id)
    return None


def read_answer(text: str, *, thinking: bool, finished: bool) -> Answer:
    """Read a text by the parsers that the server streams through. Never raises.

    `thinking`: the prompt opened a block, and the text goes on inside it; otherwise the prompt's block was empty, and one may
    only begin with the text's first word. `finished`: the turn was ended by its end mark. White space around thoughts and
    content is left out. Calls are those that stand between both tags and are JSON of a name and an object; what is not
    stays in the content and is named in `malformed`, as is a block or a call that never closes. Whether a tool exists is for
    verifiers to say.
    """
    opened = thinking or text.lstrip(SPACE).startswith(OPEN)
    thoughts, tools = ReasoningParser(thinking=thinking), ToolParser(NANO2, None)
    reasoning, rest = thoughts.feed(text)
    malformed = f"{OPEN} is never closed" if thoughts.thinking else None
    more, late = thoughts.finish()
    content, calls = tools.feed(rest + late)
    tail, _ = tools.finish()  # calls in it have no closing tag
    content = (content + tail).strip(SPACE)
    malformed = malformed or tools.malformed
    if malformed is None and NANO2.close in content:
        malformed = f"{NANO2.close} closes nothing"
    return Answer(
        text=text,
        reasoning=reasoning + more if opened else None,
        content=content,
        calls=tuple(Call(name=call.name, arguments=json.loads(call.arguments)) for call in calls),
        closing_marks=text.count(CLOSE),
        finished=finished,
        malformed=malformed,
    )
