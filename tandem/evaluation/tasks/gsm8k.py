"""Problems of GSM8K's test part for lm-eval: with the number that is right, and with three others to choose from.

The file is the one of the recipes, under its MIT licence (`recipes/data/NOTICE.md`).
"""

from __future__ import annotations

import gzip
import json
import re
from random import Random
from typing import Any

from tandem.spec.recipes import recipes_folder

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CHOICES = 4


def problems(**_: Any) -> dict[str, Any]:
    """The part `test`, as lm-eval takes a data set that is made in Python."""
    from datasets import Dataset

    with gzip.open(recipes_folder() / "data" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {"test": Dataset.from_list([problem(json.loads(line)) for line in lines])}


def problem(entry: dict[str, str]) -> dict[str, Any]:
    """One problem: question, answer, four choices in a drawn order and the place of the right one.

    The wrong ones are numbers of the worked solution and of the question, so that none looks out of place.
    """
    working, _, last = entry["answer"].rpartition("####")
    right = last.strip().replace(",", "")
    rng = Random(entry["question"])
    seen = dict.fromkeys(number.replace(",", "") for number in _NUMBER.findall(working + entry["question"]))
    wrong = [number for number in seen if number != right]
    rng.shuffle(wrong)
    near = (str(int(float(right)) + step) for step in (1, -1, 2, 10))
    wrong += [number for number in near if number not in seen]
    choices = [right, *wrong[: _CHOICES - 1]]
    rng.shuffle(choices)
    return {"question": entry["question"], "answer": right, "choices": choices, "right": choices.index(right)}
