"""Worked answers to generated problems: each step is computed here and written down, so that a model can learn to do it.

A solver takes an entry of reasoning-gym (question, answer, metadata) and gives question and derivation, or None where no true
derivation of the entry's answer can be given; such an entry is left out.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

Entry = dict[str, Any]
Solver = Callable[[Entry], tuple[str, str] | None]

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"(?<![\d.])((?:{_NUMBER} *[-+*/] *)+{_NUMBER}) *= *(-?{_NUMBER})(?!\.?\d|[/%]| *[-+*/] *\d)")
_PART = re.compile(rf"{_NUMBER}|[-+*/]")
_SIGNS = [(re.compile(r"(?<=\d),(?=\d{3})|[$€£¥]"), ""), (re.compile(r"×|(?<= )x(?= )"), "*"), (re.compile("÷"), "/")]


def chain_sum(entry: Entry) -> tuple[str, str] | None:
    """Running totals, a line each, digit by digit from the ones; None where a total falls below 0."""
    expression = str(entry["metadata"]["expression"])
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        result = _OPERATIONS[sign](total, int(number))
        if result < 0:
            return None
        lines.append(f"{total} {sign} {number}: {_by_digits(total, sign, int(number))}; {result}")
        total = result
    return f"{expression} =", "\n".join(lines)


def _by_digits(first: int, sign: str, second: int) -> str:
    """`7+8=15 4+3+1=8` for 47 + 38, `15-8=7 4-3-1=0` for 45 - 38: what is carried or borrowed comes last."""
    steps: list[str] = []
    carried = 0
    while first or second or carried or not steps:
        (first, one), (second, other) = divmod(first, 10), divmod(second, 10)
        if sign == "+":
            result = one + other + carried
            left, result_carried = f"{one}+{other}", result // 10
        else:
            result_carried = int(one < other + carried)
            one += 10 * result_carried
            result = one - other - carried
            left = f"{one}-{other}"
        steps.append(f"{left}{sign}{carried}={result}" if carried else f"{left}={result}")
        carried = result_carried
    return " ".join(steps)


def basic_arithmetic(entry: Entry) -> tuple[str, str]:
    """The expression, rewritten with one operation done a line: brackets first, then products, then from the left."""
    expression = str(entry["metadata"]["expression"])
    parts, lines = _without_brackets(expression.split()), []
    while len(parts) > 1:
        parts = _without_brackets(_reduced(parts))
        lines.append("= " + " ".join(parts))
    return f"{expression} =", "\n".join(lines or [f"= {parts[0]}"])


def _reduced(parts: list[str]) -> list[str]:
    end = parts.index(")") if ")" in parts else len(parts)
    start = max((i + 1 for i in range(end) if parts[i] == "("), default=0)
    signs = range(start + 1, end, 2)
    at = next((i for i in signs if parts[i] == "*"), signs[0])
    value = _OPERATIONS[parts[at]](int(parts[at - 1]), int(parts[at + 1]))
    return [*parts[: at - 1], str(value), *parts[at + 2 :]]


def _without_brackets(parts: list[str]) -> list[str]:
    """Brackets around a single number are gone."""
    for i in range(len(parts) - 2):
        if parts[i] == "(" and parts[i + 2] == ")":
            return _without_brackets([*parts[:i], parts[i + 1], *parts[i + 3 :]])
    return parts


def letter_counting(entry: Entry) -> tuple[str, str]:
    """Each word spelled, with its count and the total so far."""
    letter, total, lines = str(entry["metadata"]["target_letter"]), 0, []
    for word in entry["metadata"]["span"]:
        count = word.lower().count(letter)
        total += count
        lines.append(f"{' '.join(word)}: {count}, total {total}")
    return str(entry["question"]), "\n".join(lines)


def leg_counting(entry: Entry) -> tuple[str, str]:
    """Legs of each kind of animal, and the sum so far."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines: list[str] = []
    total = 0
    for name, count in entry["metadata"]["animals"].items():
        legs = count * ANIMALS[name]
        line = f"{count} {name}: {count} x {ANIMALS[name]} = {legs}"
        lines.append(f"{line}; {total} + {legs} = {total + legs}" if lines else line)
        total += legs
    question = str(entry["question"]).rpartition("Now, ")[2].strip()
    return question[0].upper() + question[1:], "\n".join(lines)


def spell_backward(entry: Entry) -> tuple[str, str]:
    """The letters, forwards and backwards."""
    word = str(entry["metadata"]["word"])
    return f"Spell this word backward: {word}", f"{' '.join(word)}\n{' '.join(reversed(word))}"


def number_sorting(entry: Entry) -> tuple[str, str]:
    """Selection sort: what is left, and which of them comes next."""
    left, lines = [str(number) for number in entry["metadata"]["original_numbers"]], []
    direction = entry["metadata"]["direction"]
    question = f"Sort these numbers in {direction} order: {', '.join(left)}"
    choose = min if direction == "ascending" else max
    while left:
        best = choose(left, key=float)
        lines.append(f"{' '.join(left)}: {best}")
        left.remove(best)
    return question, "\n".join(lines)


def word_sequence_reversal(entry: Entry) -> tuple[str, str]:
    """The words with their places, to be read from the last."""
    words = entry["metadata"]["words"]
    return f"Reverse this list of words: {', '.join(words)}", "\n".join(f"{i} {word}" for i, word in enumerate(words, start=1))


def gsm_symbolic(entry: Entry) -> tuple[str, str] | None:
    """The working that reasoning-gym gives, where it ends in the answer and all its equations hold.

    Problems with a negative result (somebody aged -2) are left out too.
    """
    steps, mark, result = str(entry["metadata"]["answer_cot"]).rpartition("####")
    if not mark or result.strip() != entry["answer"] or result.strip().startswith("-") or not equations_hold(steps):
        return None
    return str(entry["question"]).removesuffix(" Give the result as your final answer. Do not include units."), steps.strip()


def equations_hold(text: str) -> bool:
    """Whether each `a + b * c = d` of numbers in a text is true to a cent; what has words or brackets in it is not judged."""
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    for found in _EQUATION.finditer(text):
        before = text[: found.start()].rstrip()
        if before.endswith((")", "%", "*", "/", "+", "-")):
            continue
        value = _value(_PART.findall(found[1]))
        if value is None or abs(value - float(found[2])) > 0.01:
            return False
    return True


def _value(parts: list[str]) -> float | None:
    """Numbers and signs in turn, products before sums; None where it divides by zero."""
    total, product, sign = 0.0, float(parts[0]), 1
    for mark, number in zip(parts[1::2], map(float, parts[2::2]), strict=True):
        if mark == "*":
            product *= number
        elif mark == "/":
            if not number:
                return None
            product /= number
        else:
            total, product, sign = total + sign * product, number, 1 if mark == "+" else -1
    return total + sign * product


def count_bits(entry: Entry) -> tuple[str, str]:
    """Halving until nothing is left; the remainders are the bits."""
    number, total, lines = int(entry["metadata"]["number"]), 0, []
    while number:
        half, bit = divmod(number, 2)
        total += bit
        lines.append(f"{number} = 2 x {half} + {bit}, total {total}")
        number = half
    return str(entry["question"]), "\n".join(lines)


def number_filtering(entry: Entry) -> tuple[str, str]:
    """Each number compared with the bound."""
    bound, (act, side), lines = entry["metadata"]["filter_value"], entry["metadata"]["operation"].split("_"), []
    for number in entry["metadata"]["original_numbers"]:
        value, limit = float(number), float(bound)
        sign = "<" if value < limit else ">" if value > limit else "="
        stays = (sign == ("<" if side == "smaller" else ">")) == (act == "keep")
        lines.append(f"{number} {sign} {bound}: {'stays' if stays else 'goes'}")
    return str(entry["question"]).partition("\n")[0], "\n".join(lines)


def gcd(entry: Entry) -> tuple[str, str]:
    """Euclid's divisions."""
    large, small = sorted(entry["metadata"]["numbers"], reverse=True)
    lines: list[str] = []
    while small:
        lines.append(f"{large} = {large // small} x {small} + {large % small}")
        large, small = small, large % small
    return f"GCD of {' and '.join(map(str, entry['metadata']['numbers']))}?", "\n".join(lines)


def recall(entry: Entry) -> tuple[str, str]:
    """The pair that was asked for."""
    return str(entry["question"]), f"{entry['metadata']['key']}={entry['answer']}"
