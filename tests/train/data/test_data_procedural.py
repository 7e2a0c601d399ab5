"""Generated tasks: derivations that compute, verification that refuses, evaluation problems that nobody learned."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from tandem.spec.errors import SpecError
from tandem.train.data.procedural import (
    EVALUATION_SEED,
    TASKS,
    Problem,
    evaluation_problems,
    make_problems,
    problems,
    prompt_of,
    verify,
)
from tandem.train.data.solvers import equations_hold

SUMS = re.compile(r"(-?\d+(?: [-+x*] -?\d+)+) = (-?\d+)")
DIVISIONS = re.compile(r"(\d+) = (\d+) x (\d+) \+ (\d+)")
COUNT = 500


@pytest.fixture(scope="module", params=sorted(TASKS))
def some(request: pytest.FixtureRequest) -> list[Problem]:
    return list(islice(problems(request.param, 7), COUNT))


def test_every_derivation_ends_in_the_right_answer(some: list[Problem]) -> None:
    for problem in some:
        assert verify(problem.task, problem, problem.text), problem.text
        assert problem.text.startswith(prompt_of(problem))
        assert problem.text.count("<think>") == problem.text.count("</think>") == 1
        assert problem.derivation.strip() == problem.derivation != ""


def test_derivations_hold_line_by_line(some: list[Problem]) -> None:
    """Equations are evaluated by Python; and the answer is what the last step says, found by rules of each task."""
    for problem in some:
        task, steps, answer = problem.task, problem.derivation, problem.answer
        last = steps.split("\n")[-1]
        if task == "chain_sum":
            _check_sums(problem)
        elif task == "leg_counting":
            found = SUMS.findall(steps)
            assert len(found) >= len(steps.split("\n"))
            for left, right in found:
                assert eval(left.replace("x", "*")) == int(right), steps
            assert last.rsplit("= ", 1)[1] == answer
        elif task == "basic_arithmetic":
            assert {eval(line.removeprefix("= ")) for line in steps.split("\n")} == {int(answer)}
            assert last == f"= {answer}"
        elif task in ("count_bits", "gcd"):
            for number, times, divisor, rest in DIVISIONS.findall(steps):
                assert int(number) == int(times) * int(divisor) + int(rest)
                assert int(rest) < (2 if task == "count_bits" else int(divisor))
            assert answer == (last.split()[-1] if task == "count_bits" else DIVISIONS.findall(last)[0][2])
        elif task == "letter_counting":
            letter = problem.entry["metadata"]["target_letter"]
            total = 0
            for line in steps.split("\n"):
                word, _, rest = line.rpartition(": ")
                count, running = map(int, rest.split(", total "))
                assert word.replace(" ", "").lower().count(letter) == count
                total += count
                assert running == total
            assert answer == str(total)
        elif task == "spell_backward":
            forwards, backwards = steps.replace(" ", "").split("\n")
            assert problem.question.endswith(f": {forwards}")
            assert backwards == forwards[::-1] == answer
        elif task in ("number_sorting", "number_filtering", "word_sequence_reversal"):
            _check_list(problem)
        elif task == "gsm_symbolic":
            assert equations_hold(steps)
        else:
            assert task == "recall"
            assert steps in problem.question
            assert steps == f"{problem.question.split()[-1][:-1]}={answer}"


def _check_sums(problem: Problem) -> None:
    """Each line goes on from the total before; its digits, last ones first, make up the new total."""
    total, *rest = problem.question.removesuffix(" =").split()
    for line, sign, number in zip(problem.derivation.split("\n"), rest[::2], rest[1::2], strict=True):
        asked, digits, result = re.fullmatch(r"(.+): (.+); (\d+)", line).groups()  # type: ignore[union-attr]
        assert asked == f"{total} {sign} {number}"
        assert eval(asked) == int(result) >= 0
        equations = [part.split("=") for part in digits.split(" ")]
        assert all(eval(left) == int(right) for left, right in equations), line
        assert int("".join(right[-1] for _, right in reversed(equations))) == int(result)
        total = result
    assert total == problem.answer


def _check_list(problem: Problem) -> None:
    lines = problem.derivation.split("\n")
    if problem.task == "number_sorting":
        chosen = [line.split(": ")[1] for line in lines]
        assert chosen == sorted(chosen, key=float, reverse="descending" in problem.question)
    elif problem.task == "number_filtering":
        chosen = [line.split()[0] for line in lines if line.endswith("stays")]
        for number, sign, bound in (line.split(":")[0].split() for line in lines):
            assert eval(f"{number} {sign.replace('=', '==')} {bound}")
    else:
        chosen = [line.split(" ", 1)[1] for line in reversed(lines)]
        assert problem.answer == ", ".join(chosen)
        return
    assert problem.answer == str(chosen)


def test_wrong_answers_are_refused(some: list[Problem]) -> None:
    for problem in some[:100]:
        prompt = prompt_of(problem)
        answer = problem.answer
        wrong = [f"{answer}1", f"1{answer}", "", " ", answer[:-1] if len(answer) > 1 else "x", f"{answer} or so", "[]"]
        if answer.lstrip("-").isdigit():
            wrong += [str(int(answer) + 1), str(int(answer) - 1), f"{answer}.5", f"-{answer}" if int(answer) > 0 else "9999"]
        for text in wrong:
            if text == answer:
                continue
            assert not verify(problem.task, problem, f"{prompt}{problem.derivation}\n</think>\n{text}"), (text, answer)
        assert not verify(problem.task, problem, f"{problem.derivation}\n{answer}")
        assert not verify(problem.task, problem, f"{problem.derivation}\n</think>\n</think>\n{answer}")
        assert not verify(problem.task, problem, f"{problem.derivation}\n</think>\n{answer}</think>")
        assert not verify(problem.task, problem, f"{answer}\n</think>\n")
        assert verify(problem.task, problem, f"whatever\n</think>\n {answer} \n")


def test_lists_whose_numbers_are_off_by_one_are_refused() -> None:
    """The generator's own score takes them, with a tolerance of one."""
    problem = make_problems("number_sorting", 1, 0)[0]
    numbers = re.findall(r"\d+", problem.answer)
    off = str([str(int(number) + 1) for number in numbers])
    assert not verify("number_sorting", problem, f"</think>{off}")
    assert verify("number_sorting", problem, f"</think>{problem.answer}")


def test_numbers_are_compared_as_numbers() -> None:
    problem = make_problems("gsm_symbolic", 1, 0)[0]
    assert verify("gsm_symbolic", problem, f"</think>{problem.answer}.0")


def test_same_seed_same_problems_and_fewer_are_the_beginning(some: list[Problem]) -> None:
    task = some[0].task
    again = list(islice(problems(task, 7), 50))
    assert again == some[:50]
    assert make_problems(task, 20, 3) == make_problems(task, 40, 3)[:20]
    assert len({p.question for p in make_problems(task, 40, 3)}) == 40


@pytest.mark.parametrize("task", ["chain_sum", "letter_counting"])
def test_neighbouring_seeds_share_no_run_of_problems(task: str) -> None:
    """reasoning-gym's item i of seed s is its item i - 1 of seed s + 1; ours are not."""
    first = [p.question for p in islice(problems(task, 0), 300)]
    second = [p.question for p in islice(problems(task, 1), 301)]
    assert sum(a == b for a, b in zip(first[1:], second, strict=False)) < 30
    assert first != second[:300]


def test_evaluation_problems_are_of_their_own_seed() -> None:
    assert evaluation_problems("chain_sum", 30) == make_problems("chain_sum", 30, EVALUATION_SEED)


def test_more_problems_than_there_are() -> None:
    with pytest.raises(SpecError, match="count_bits has only about 1023 different questions"):
        make_problems("count_bits", 1024, 0)


def test_problems_are_learnable_at_nano_scale(some: list[Problem]) -> None:
    if some[0].task != "gsm_symbolic":
        assert max(len(problem.text) for problem in some) < 512


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("He has 3 + 4 = 7 apples.", True),
        ("He has 3 + 4 = 8 apples.", False),
        ("5 x $20 = $100", True),
        ("5 x $20 = $110", False),
        ("$1,200 / 2 = 600", True),
        ("27 / 18 = 1 sheets", False),
        ("2 + 3 * 4 = 14", True),
        ("2 + 3 * 4 = 20", False),
        ("10 / 3 = 3.33", True),
        ("14/56 = 1/4", True),
        ("9 / 10 = 90.0%", True),
        ("10 pages x 2/3 = 6", True),
        ("(3 + 4) * 2 = 14", True),
        ("3 + 1 = 2 * 2 = 4", True),
        ("1 / 0 = 1", False),
        ("no numbers", True),
    ],
)
def test_equations(text: str, holds: bool) -> None:
    assert equations_hold(text) is holds
