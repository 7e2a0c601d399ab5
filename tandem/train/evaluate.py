"""How good a base model is: loss on held-out text, answers that verify themselves, greedy continuations.

Nothing here takes gradients, draws random numbers or changes the model: it is the same afterwards, its training mode included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.packing import IGNORED
from tandem.train.data.shards import encode_plain
from tandem.train.loss import Trainee

if TYPE_CHECKING:
    from tandem.train.data.procedural import Problem

_Z95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""


class LabelledBatch(Protocol):
    """Arrays [rows, time] of whole numbers, as a token stream gives them."""

    @property
    def input_ids(self) -> np.ndarray[Any, Any]:
        """Tokens."""

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """The next token, -100 where it is not learned."""

    @property
    def documents(self) -> np.ndarray[Any, Any]:
        """Number of the document that each token belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """`correct` of `count` answers, with the 95 % interval of the share that they estimate."""

    correct: int
    count: int

    def __post_init__(self) -> None:
        require_int("count", self.count)
        require_int("correct", self.correct, low=0, high=self.count)

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return wilson_interval(self.correct, self.count)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return wilson_interval(self.correct, self.count)[1]


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): those shares p from which `correct` lies within z standard errors.

    Unlike the interval around the observed share it stays within 0 and 1, and has a width at 0 and at 1.
    """
    share, z2 = correct / count, _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == count else centre + half)


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Without gradients and with every module in evaluation mode; afterwards each one is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def loss_sum(model: Module, batches: Iterable[LabelledBatch]) -> tuple[float, int]:
    """Loss summed over the learned tokens of the batches (nats), and how many those are: what ranks add up.

    `model` is a decoder, or the `Trainee` of a run with the arithmetic of its head.
    """
    trainee = Trainee(model, _fp32_product) if isinstance(model, Decoder) else model
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            ids, labels, documents = (
                torch.as_tensor(np.asarray(part, dtype=np.int64), device=device)
                for part in (batch.input_ids, batch.labels, batch.documents)
            )
            total += float(trainee(ids, labels, documents))
            tokens += int((labels != IGNORED).sum())
    return total, tokens


def held_out_loss(model: Module, batches: Iterable[LabelledBatch]) -> float:
    """Mean loss of a learned token over all batches (nats). Every token counts the same, whichever batch it is in.

    `model` is a decoder or a `Trainee`. Raises SpecError where no token is learned.
    """
    total, tokens = loss_sum(model, batches)
    if not tokens:
        raise SpecError("batches: hold no learned token; give more of them, or a source with held-out documents")
    return total / tokens


def _fp32_product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    return a.float() @ b.float()


def generate_greedy(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Iterable[int] = (),
    *,
    batch: int = 32,
) -> list[list[int]]:
    """The likeliest next tokens of each prompt (token ids), up to the first of `stop_ids`, which is left out, or `max_tokens`.

    Prompts of similar length run together, `batch` at a time; what comes back is in the order given and, but for
    rounding, does not depend on what ran beside it. Raises SpecError for an empty prompt.
    """
    require_int("max_tokens", max_tokens)
    require_int("batch", batch)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise SpecError(f"prompts[{i}]=[]: has no tokens; begin it with the tokenizer's begin-of-text")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    stops = frozenset(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            for row, answer in zip(rows, _greedy(model, [prompts[i] for i in rows], max_tokens, stops), strict=True):
                answers[row] = answer
    return answers


def _greedy(model: Decoder, prompts: list[Sequence[int]], max_tokens: int, stops: frozenset[int]) -> list[list[int]]:
    """Of one batch. Rows that have ended are taken out of the state once they are half of it: taking out copies the rest."""
    ids, mask = _padded(prompts)
    state = model.new_state(len(prompts), capacity=ids.shape[1] + max_tokens)
    kept, state = model.prefill(ids.to(model.device), state, attention_mask=mask.to(model.device))
    following = kept[:, -1].argmax(-1).tolist()
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt of each row of the state
    ended = [False] * len(prompts)
    for left in range(max_tokens - 1, -1, -1):
        for row, token in zip(rows, following, strict=True):
            if token in stops:
                ended[row] = True
            elif not ended[row]:
                answers[row].append(token)
        going = [i for i, row in enumerate(rows) if not ended[row]]
        if not left or not going:
            break
        if 2 * len(going) <= len(rows):
            state, rows, following = state.slice(going), [rows[i] for i in going], [following[i] for i in going]
        logits, state = model.decode(torch.tensor(following, device=model.device), state)
        following = logits.argmax(-1).tolist()
    return answers


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Prompts as rows of one length, padded on the left with token 0, and the mask that says what is a prompt."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def special_id(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of `bos_token` or another special token by the name that templates use; None where the tokenizer has none."""
    text = tokenizer.special.get(name)
    found: int | None = None if text is None else tokenizer.backend.token_to_id(text)
    return found


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt as documents begin in pre-training: begin-of-text, where the tokenizer has it, then the text."""
    bos = special_id(tokenizer, "bos_token")
    return ([] if bos is None else [bos]) + encode_plain(tokenizer, [text])[0]


def samples(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int = 64, batch: int = 32
) -> list[str]:
    """Greedy continuations of texts, up to the tokenizer's end-of-text or `max_tokens`."""
    eos = special_id(tokenizer, "eos_token")
    stops = set(model.token_ids.eos) | (set() if eos is None else {eos})
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    return [tokenizer.decode(answer) for answer in generate_greedy(model, ids, max_tokens, stops, batch=batch)]


def task_accuracy(
    model: Decoder, tokenizer: Tokenizer, task: str, problems: Sequence[Problem], *, batch: int = 32, max_tokens: int = 256
) -> Accuracy:
    """How many problems of a procedural task the model answers rightly, greedily and without an example before them.

    The task's own verifier judges what stands after the closing think mark (`tandem.train.data.procedural.verify`); an
    answer that is not ended within `max_tokens` is judged as it stands.
    """
    from tandem.train.data.procedural import prompt_of, verify

    texts = samples(model, tokenizer, [prompt_of(problem) for problem in problems], max_tokens=max_tokens, batch=batch)
    right = sum(verify(task, problem, text) for problem, text in zip(problems, texts, strict=True))
    return Accuracy(correct=right, count=len(problems))
