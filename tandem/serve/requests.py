"""From a valid body to requests for the engine, one for each answer, and to what will write the answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.align.parsers import ToolParser
from tandem.engine.types import EngineRequest, SamplingParams
from tandem.model.tokenizer import Tokenizer
from tandem.serve.chat import ChatTemplate, Prompt
from tandem.serve.choices import ChatChoice, Choice, TextChoice
from tandem.serve.config import ServeConfig
from tandem.serve.encoding import encode_within
from tandem.serve.errors import ApiError, bad_request
from tandem.serve.params import SEEDS, chosen_tools, grammar_of, sampling_of
from tandem.serve.schemas import ChatRequest, CompletionRequest, Sampling
from tandem.serve.spelling import TokenTexts

_COMPLETION_TOKENS = 16
"""Output tokens of a completion that does not say, as the OpenAI API has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One HTTP request: what the engine is asked, and who writes what it answers. Requests and choices go in pairs."""

    id: str
    kind: str
    """`chat.completion` or `text_completion`."""
    client: str
    requests: tuple[EngineRequest, ...]
    choices: tuple[Choice, ...]
    stream: bool
    include_usage: bool


class Preparer:
    """Turns bodies into work, for one model. `draw_seed` gives the seeds of requests that bring none."""

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        config: ServeConfig,
        max_context: Callable[[], int],
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.model_name = model_name
        self.template = ChatTemplate(tokenizer, config.chat_format)
        self._tokenizer = tokenizer
        self._config = config
        self._max_context = max_context
        self._draw_seed = draw_seed
        self._texts = TokenTexts(tokenizer)
        self._vocabulary: int = tokenizer.backend.get_vocab_size(with_added_tokens=True)

    def chat(self, body: ChatRequest, client: str) -> Work:
        """Work of POST /v1/chat/completions. Raises ApiError and SpecError."""
        self._check(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs: needs logprobs=true", param="top_logprobs")
        asked = body.max_completion_tokens
        if asked is not None and body.max_tokens not in (None, asked):
            raise bad_request(f"max_tokens={body.max_tokens}: differs from max_completion_tokens={asked}; give one of them")
        template, tools = self.template, chosen_tools(body)
        prompt = template.prompt(body.messages, tools=tools, variables=body.chat_template_kwargs, most=self._most())
        sampling = sampling_of(
            body,
            max_tokens=self._max_tokens(prompt.ids, asked or body.max_tokens, self._config.default_max_tokens),
            seed=self._seed(body),
            vocabulary=self._vocabulary,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar_of(body, template=template),
            skip_special_tokens=not template.tag_ids,
        )
        names = [tool.function.name for tool in tools]
        syntax = template.syntax
        choices = [
            ChatChoice(
                i,
                self._texts if body.logprobs else None,
                thinking=prompt.thinking,
                close_id=template.close_id,
                tools=ToolParser(syntax, names) if names and syntax is not None else None,
                parallel=body.parallel_tool_calls is not False,
            )
            for i in range(body.n or 1)
        ]
        return self._work("chat.completion", body, client, [prompt], [sampling], choices)

    def completion(self, body: CompletionRequest, client: str) -> Work:
        """Work of POST /v1/completions. Raises ApiError and SpecError."""
        self._check(body)
        n, count = body.n or 1, _count(body.prompt)
        if not count or count * n > self._config.max_choices:
            raise self._too_many(count, n)
        prompts = [Prompt(ids) for ids in self._prompts(body)]
        seed, grammar = self._seed(body), grammar_of(body)
        samplings = [
            sampling_of(
                body,
                max_tokens=self._max_tokens(prompt.ids, body.max_tokens, _COMPLETION_TOKENS),
                seed=seed,
                vocabulary=self._vocabulary,
                logprobs=body.logprobs,
                grammar=grammar,
            )
            for prompt in prompts
        ]
        texts = self._texts if body.logprobs is not None else None
        choices = [TextChoice(i, texts) for i in range(len(prompts) * n)]
        return self._work("text_completion", body, client, prompts, samplings, choices)

    def _check(self, body: Sampling) -> None:
        if body.model != self.model_name:
            message = f"model={body.model[:100]!r}: is not served here; {self.model_name!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")
        if (body.n or 1) > self._config.max_choices:
            raise self._too_many(1, body.n or 1)
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options: needs stream=true", param="stream_options")

    def _too_many(self, prompts: int, n: int) -> ApiError:
        most = self._config.max_choices
        if n > most:
            return bad_request(f"n={n}: must be from 1 to {most}", param="n")
        message = f"prompt: holds {prompts} prompts; times n={n} that must be from 1 to {most}"
        return bad_request(message, param="prompt")

    def _seed(self, body: Sampling) -> int:
        return self._draw_seed() if body.seed is None else body.seed

    def _prompts(self, body: CompletionRequest) -> list[tuple[int, ...]]:
        prompt = body.prompt
        if isinstance(prompt, str):
            return [tuple(encode_within(self._tokenizer, prompt, self._most()))]
        found = []
        for item in [prompt] if prompt and isinstance(prompt[0], int) else prompt:
            if isinstance(item, str):
                found.append(tuple(encode_within(self._tokenizer, item, self._most())))
                continue
            assert isinstance(item, list)
            ids = tuple(token for token in item if isinstance(token, int))
            if ids and max(ids) >= self._vocabulary:
                raise bad_request(f"prompt: holds token {max(ids)}; ids go from 0 to {self._vocabulary - 1}", param="prompt")
            found.append(ids)
        return found

    def _most(self) -> int:
        """Tokens that a prompt may have."""
        most = self._max_context()
        return most if self._config.max_prompt_tokens is None else min(most, self._config.max_prompt_tokens)

    def _max_tokens(self, ids: Sequence[int], asked: int | None, default: int | None) -> int:
        most, config, isl = self._max_context(), self._config, len(ids)
        if not isl:
            raise bad_request("prompt: has no tokens; give some text", param="prompt")
        if config.max_prompt_tokens is not None and isl > config.max_prompt_tokens:
            message = f"prompt: has {isl:,} tokens; this server takes {config.max_prompt_tokens:,}"
            raise bad_request(message, param="prompt", code="context_length_exceeded")
        if isl + (asked or 1) > most:
            message = (
                f"the model's context holds {most:,} tokens; this request needs {isl + (asked or 1):,}: {isl:,} of the "
                f"prompt and {asked or 1:,} of output. Shorten the prompt or lower max_tokens"
            )
            raise bad_request(message, param="max_tokens" if isl < most else "prompt", code="context_length_exceeded")
        return asked if asked is not None else min(default or most, most - isl)

    def _work(
        self,
        kind: str,
        body: Sampling,
        client: str,
        prompts: list[Prompt],
        samplings: list[SamplingParams],
        choices: Sequence[Choice],
    ) -> Work:
        name = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(12)}"
        n = len(choices) // len(prompts)
        requests = []
        for i, choice in enumerate(choices):
            prompt, sampling = prompts[i // n], samplings[i // n]
            choice.prompt_tokens = len(prompt.ids)
            choice.counts_prompt = i % n == 0
            requests.append(
                EngineRequest(
                    id=name if len(choices) == 1 else f"{name}-{i}",
                    prompt_ids=prompt.ids,
                    sampling=sampling if i % n == 0 else replace(sampling, seed=(sampling.seed + i % n) % SEEDS),
                    client=client,
                    thinking=prompt.thinking,
                )
            )
        return Work(
            id=name,
            kind=kind,
            client=client,
            requests=tuple(requests),
            choices=tuple(choices),
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )


def _count(prompt: str | Sequence[object]) -> int:
    """How many prompts a completion asks for: token ids side by side are one."""
    return 1 if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else len(prompt)
