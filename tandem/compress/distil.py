"""Distillation: a student learns its teacher's distribution over the next token, and nothing else (paper A section 4.2).

    loss = sum over learned tokens of KL(teacher || student) = sum of q (log q - log p),    T = 1, no cross-entropy

The training loop is that of pre-training: `train_model` is given a `Student` where it would make a `Trainee`. What the teacher
says of a batch may be kept on disk, its largest k probabilities and the rest as one: several students then learn from one
reading.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int
from tandem.train.data.packing import IGNORED
from tandem.train.loss import Product, summed_loss

_PIECE_NUMBERS = 2**22
"""Logits of the teacher that are held at once while its largest are looked for."""


class Said(NamedTuple):
    """What a teacher says of some tokens: its k most probable next ones; of all others only how probable they are together."""

    tokens: Int[Tensor, "n k"]
    log_q: Float[Tensor, "n k"]
    """Log-probabilities, nats."""


class Teacher:
    """A decoder that says what it would have said, from its weights or from what it said before."""

    def __init__(self, decoder: Decoder, *, top_k: int | None = None, folder: Path | None = None) -> None:
        """`top_k` None keeps all probabilities, which are never written. With a folder, what was said lies there.

        Raises SpecError for a folder without `top_k`.
        """
        if top_k is not None:
            require_int("top_k", top_k, high=decoder.spec.vocab_size)
        if folder is not None and top_k is None:
            raise SpecError("top_k=None: all probabilities of all tokens are not kept on disk; state how many of each token")
        self.decoder, self.top_k, self._folder = decoder.eval().requires_grad_(False), top_k, folder

    @torch.no_grad()
    def hidden(self, input_ids: Int[Tensor, "b t"], documents: Int[Tensor, "b t"], learned: Tensor) -> Float[Tensor, "n d"]:
        """What goes into its head at the learned tokens."""
        return self.decoder.hidden_states(input_ids, documents=documents).flatten(0, 1)[learned]

    @torch.no_grad()
    def log_q(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Log-probabilities of all tokens."""
        logits: Tensor = self.decoder.lm_head(hidden)
        return functional.log_softmax(logits.float(), 1)

    def said(self, input_ids: Int[Tensor, "b t"], documents: Int[Tensor, "b t"], learned: Tensor) -> Said:
        """Its `top_k` at the learned tokens; read where it said them before of the same batch."""
        file = None if self._folder is None else self._folder / f"{_name(input_ids, documents, learned)}.safetensors"
        if file is not None and file.is_file():
            kept = load_file(file)
            return Said(kept["tokens"].long(), kept["log_q"])
        found = self._top(self.hidden(input_ids, documents, learned))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".new")
            save_file({"tokens": found.tokens.int(), "log_q": found.log_q}, draft)
            draft.replace(file)
        return found

    def _top(self, hidden: Float[Tensor, "n d"]) -> Said:
        assert self.top_k is not None
        rows = max(1, _PIECE_NUMBERS // self.decoder.spec.vocab_size)
        parts = [self.log_q(piece).topk(self.top_k, 1) for piece in hidden.split(rows)]
        return Said(torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts]))


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Makes a student of a decoder, where pre-training makes a `Trainee`."""

    teacher: Teacher

    def __call__(self, decoder: Decoder, product: Product) -> Student:
        """The student, whose forward pass is its loss. Raises SpecError for another vocabulary than the teacher's."""
        if decoder.spec.vocab_size != self.teacher.decoder.spec.vocab_size:
            raise SpecError(
                f"vocab_size={decoder.spec.vocab_size}: the teacher has {self.teacher.decoder.spec.vocab_size}; must be equal"
            )
        return Student(decoder, product, self.teacher)


class Student(nn.Module):
    """A decoder whose forward pass is its distance from a teacher. The teacher is none of its parts: it is not trained."""

    def __init__(self, decoder: Decoder, product: Product, teacher: Teacher) -> None:
        super().__init__()
        self.decoder, self.product = decoder, product
        self._teacher = (teacher,)

    def forward(
        self, input_ids: Int[Tensor, "b t"], labels: Int[Tensor, "b t"], documents: Int[Tensor, "b t"]
    ) -> Float[Tensor, ""]:
        """Sum of KL(teacher || student) in nats over all tokens with a label, fp32; what the labels are does not matter."""
        (teacher,) = self._teacher
        learned = labels.flatten() != IGNORED
        hidden = self.decoder.hidden_states(input_ids, documents=documents).flatten(0, 1)[learned]
        if teacher.top_k is None:
            theirs = teacher.hidden(input_ids, documents, learned)

            def piece_loss(rows: slice, log_p: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
                return kl_of_all(teacher.log_q(theirs[rows]), log_p, wanted)

        else:
            said = teacher.said(input_ids, documents, learned)

            def piece_loss(rows: slice, log_p: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
                return kl_of_top(said.tokens[rows], said.log_q[rows], log_p, wanted)

        return summed_loss(hidden, self.decoder.lm_head.weight, piece_loss, self.product)


def kl_of_all(
    log_q: Float[Tensor, "n v"], log_p: Float[Tensor, "more v"], wanted: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "more v"] | None]:
    """Sum of q (log q - log p) over the first n rows, and its gradient p - q in the logits of p; `log_p` is overwritten."""
    count, q = len(log_q), log_q.exp()
    loss = (q * (log_q - log_p[:count])).sum()
    if not wanted:
        return loss, None
    grad = log_p.exp_()
    grad[:count] -= q
    return loss, grad


def kl_of_top(
    tokens: Int[Tensor, "n k"], log_q: Float[Tensor, "n k"], log_p: Float[Tensor, "more v"], wanted: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "more v"] | None]:
    """The same where q is known of k tokens and the rest r of it is one more outcome, whose p is that of all others together.

    It is at most the full KL divergence, and equal to it where k is the vocabulary. The gradient is p less q at the k tokens,
    and p (1 - r / p_rest) at the others.
    """
    count, q = len(log_q), log_q.exp()
    known = log_p[:count].gather(1, tokens)
    least = 8 * torch.finfo(q.dtype).eps  # what is left of 1 is not known more exactly
    rest_q, rest_p = 1 - q.sum(1), (1 - known.exp().sum(1)).clamp(min=least)
    rest_q = torch.where(rest_q < least, 0.0, rest_q)
    loss = (q * (log_q - known)).sum() + torch.special.xlogy(rest_q, rest_q.clamp(min=least) / rest_p).sum()
    if not wanted:
        return loss, None
    at_known = known.exp() - q
    grad = log_p.exp_()
    grad[:count] *= (1 - rest_q / rest_p)[:, None]
    grad[:count].scatter_(1, tokens, at_known)
    return loss, grad


def _name(*parts: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
