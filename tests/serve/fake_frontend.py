"""A frontend without a model: says what a script says, one token at a time, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tandem.engine.types import EngineRequest, Logprobs, TokenOutput
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }} as <tool_call>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, *, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Tokenizer:
    """One token a byte; `special` and `plain` are whole words beside them."""
    symbols = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<pad>", "<s>", "</s>", *special)])
    inner.add_tokens([AddedToken(text, special=False) for text in plain])
    return Tokenizer(inner, template=template, special={"bos_token": "<s>", "eos_token": "</s>"})


Script = str | list[str] | Callable[[EngineRequest], list[str]]


class FakeFrontend:
    """Answers with `script`: a text (a token a character) or the texts of the outputs."""

    def __init__(self, script: Script = "Hello, world", *, reason: str = "stop", max_context: int = 4096) -> None:
        self.script = script
        self.reason = reason
        self.max_context = max_context
        self.ready = True
        self.in_flight = 0
        self.asked: list[EngineRequest] = []
        self.closed: list[str] = []
        """Ids of requests whose stream was given up before its end."""
        self.hold_after: int | None = None
        """Outputs after which a stream waits for `go`."""
        self.go = asyncio.Event()
        self.held = asyncio.Event()
        self.fail: BaseException | None = None
        self.fail_at = 0
        self.error = "the engine broke"
        self.refusal: str | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def stream(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """See `Frontend`."""
        self.loop = asyncio.get_running_loop()
        self.asked.append(request)
        if self.refusal is not None:
            raise SpecError(self.refusal)
        self.in_flight += 1
        ended = False
        try:
            for i, output in enumerate(self.outputs(request)):
                if i == self.hold_after:
                    self.held.set()
                    await self.go.wait()
                if self.fail is not None and i == self.fail_at:
                    raise self.fail
                await asyncio.sleep(0)
                ended = output.finish_reason is not None
                yield output
        finally:
            self.in_flight -= 1
            if not ended:
                self.closed.append(request.id)

    def outputs(self, request: EngineRequest) -> list[TokenOutput]:
        """What the script says to a request, cut at its max_tokens."""
        script = self.script(request) if callable(self.script) else self.script
        texts = list(script)[: request.sampling.max_tokens] or [""]
        cut = len(texts) < len(list(script))
        outputs = []
        for i, text in enumerate(texts):
            last = i == len(texts) - 1
            token = 3 + sum(text.encode()) % 256
            entry = Logprobs(token, -0.5, ((token, -0.5), (4, float("-inf")))[: request.sampling.logprobs])
            outputs.append(
                TokenOutput(
                    request_id=request.id,
                    index=i,
                    token_ids=(token,),
                    text=text,
                    logprobs=None if request.sampling.logprobs is None else (entry,),
                    finish_reason=("length" if cut else self.reason) if last else None,  # type: ignore[arg-type]
                    error=self.error if last and self.reason == "error" else None,
                    cached_tokens=min(4, len(request.prompt_ids)) if i == 0 else None,
                )
            )
        return outputs
