from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compress_cases import HYBRID, shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tandem.compress.distil import Distillation, Teacher, kl_of_all, kl_of_top
from tandem.model.hybrid import Decoder
from tandem.spec.errors import SpecError
from tandem.train.data.packing import IGNORED


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two documents a row; a third of the tokens is not learned."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (2, 20), generator=draw)
    labels = torch.randint(0, 64, (2, 20), generator=draw).masked_fill(ids < 20, IGNORED)
    return ids, labels, (torch.arange(20) >= 12).long().expand(2, -1)


def plain_kl(student: Decoder, teacher: Decoder, ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
    log_p, log_q = (m(ids, documents=documents).log_softmax(-1) for m in (student, teacher))
    return functional.kl_div(log_p, log_q.detach(), log_target=True, reduction="none").sum(-1)[labels != IGNORED].sum()


@pytest.mark.parametrize("top_k", [None, 64])
def test_loss_and_gradients_are_those_of_torchs_kl(top_k: int | None) -> None:
    student, teacher, given_batch = shaken(HYBRID, 1), shaken(HYBRID, 2), batch()
    expected = plain_kl(student, teacher, *given_batch)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    learner = Distillation(teacher=Teacher(teacher, top_k=top_k))(student, torch.mm)
    loss = learner(*given_batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (loss / 3).backward()
    for name, p in student.named_parameters():
        assert (p.grad is None) == (name not in wanted), name
        if p.grad is not None:
            assert torch.allclose(3 * p.grad, wanted[name], atol=1e-5, rtol=1e-3), name
    assert all(p.grad is None for p in teacher.parameters())
    assert {name.removeprefix("decoder.") for name, _ in learner.named_parameters()} == dict(student.named_parameters()).keys()


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    teacher = shaken(HYBRID)
    for top_k in (None, 5):
        student = shaken(HYBRID)
        loss = Distillation(teacher=Teacher(teacher, top_k=top_k))(student, torch.mm)(*batch())
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-4)
        assert all(p.grad is None or p.grad.abs().max() < 1e-4 for p in student.parameters())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_the_largest_k_and_the_rest_are_a_coarser_distribution(k: int, seed: int, peaked: bool) -> None:
    """KL of grouped outcomes by torch, its gradient by autograd; never above the full one."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    log_q = (torch.randn(3, 8, generator=draw, dtype=torch.float64) * (30 if peaked else 1)).log_softmax(-1)
    top = log_q.topk(k, 1)
    log_p = logits.log_softmax(-1)
    groups = torch.full((3, 8), k).scatter(1, top.indices, torch.arange(k).expand(3, -1))
    p, q = (torch.zeros(3, k + 1, dtype=torch.float64).scatter_add(1, groups, x.exp()) for x in (log_p, log_q))
    expected = torch.where(q > 0, q * (q.clamp(min=1e-30).log() - p.clamp(min=1e-30).log()), 0).sum()
    (grad,) = torch.autograd.grad(expected, logits)
    more = torch.cat([log_p.detach(), torch.zeros(2, 8, dtype=torch.float64)])
    loss, got = kl_of_top(top.indices, top.values, more.clone(), True)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-8)
    assert got is not None
    assert torch.allclose(got[:3], grad, atol=1e-6)
    full, _ = kl_of_all(log_q, more.clone(), False)
    assert loss.item() <= full.item() + 1e-9
    if k == 8:
        assert loss.item() == pytest.approx(full.item(), abs=1e-8)


def test_what_a_teacher_said_is_read_again(tmp_path: Path) -> None:
    teacher, student = shaken(HYBRID, 2), shaken(HYBRID, 1)
    folder = tmp_path / "said"
    first = Distillation(teacher=Teacher(teacher, top_k=7, folder=folder))(student, torch.mm)(*batch())
    assert len(list(folder.iterdir())) == 1
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
    again = Distillation(teacher=Teacher(teacher, top_k=7, folder=folder))
    assert torch.equal(again(student, torch.mm)(*batch()), first)
    other = again(student, torch.mm)(*batch(1))
    assert len(list(folder.iterdir())) == 2
    assert torch.isfinite(other)
    nothing = Distillation(teacher=Teacher(teacher, top_k=7))(student, torch.mm)(*batch())
    assert not torch.equal(nothing, first)


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    teacher = shaken(HYBRID)
    with pytest.raises(SpecError, match="top_k=None: all probabilities"):
        Teacher(teacher, folder=tmp_path)
    with pytest.raises(SpecError, match="top_k=65: must be"):
        Teacher(teacher, top_k=65)
    with pytest.raises(SpecError, match="vocab_size=32: the teacher has 64"):
        Distillation(teacher=Teacher(teacher))(Decoder(replace(HYBRID, vocab_size=32)), torch.mm)
