"""The card of prepared data in the Hugging Face format, from the report of its preparation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tandem.train.card_text import bullets, card, code, table
from tandem.train.data.document import BadRow
from tandem.train.data.prepared import DataReport, SourceReport, generated
from tandem.train.recipe import Recipe

_LICENCES = {
    "mit": "mit",
    "apache-2.0": "apache-2.0",
    "cc-by-4.0": "cc-by-4.0",
    "cc0-1.0": "cc0-1.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0",
}
"""A source's licence as hubs name it; all others are `other` there and in words in the card."""
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def data_card(recipe: Recipe, data: DataReport, *, date: str, version: str, notices: str = "", language: str = "en") -> str:
    """The card of a run's prepared data.

    `notices` is Markdown that licences ask for in full, such as that of the folder the texts come from; `date` and `version`
    (of Tandem) stand in the card as given.
    """
    documents = sum(source.documents for source in data.sources)
    licences = sorted({_hub_licence(source.licence) for source in data.sources})
    front: dict[str, Any] = {
        "pretty_name": f"Data of {recipe.name}",
        "language": [language],
        "license": licences[0] if len(licences) == 1 else licences,
        "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in _SIZES if documents < limit), "10M<n<100M")],
        "tags": ["tandem", "pre-training", *(["synthetic"] if any(generated(source.kind) for source in data.sources) else [])],
    }
    clean = recipe.data.clean
    near = "kept" if clean.near_duplicates is None else f"dropped from a Jaccard similarity of {clean.near_duplicates:g} on"
    rules = [
        f"below {clean.min_chars:,} character{'s' * (clean.min_chars != 1)}, or without anything to learn: dropped",
        f"equal text, in all sources together: {'dropped' if clean.exact_duplicates else 'kept'}",
        f"nearly equal text (MinHash over word 5-grams, read sources only): {near}",
        f"quality below {clean.min_quality:g} of 1 (rules in tandem/train/data/quality.py, read sources only): dropped",
        f"sharing {clean.decontaminate_ngram} words in a row with an evaluation set: dropped; sets "
        + (", ".join(clean.decontaminate) or "none"),
        "generated problems that are asked in evaluations: dropped",
    ]
    parts = [
        f"# Data of {recipe.name}",
        f"{documents:,} documents of {len(data.sources)} sources, {data.tokens:,} tokens to learn from. Prepared {date} with "
        f"Tandem {version}.",
        "## Sources",
        table(
            (
                "source",
                "kind",
                "licence",
                "read",
                "kept",
                "held out",
                "characters",
                "tokens",
                "of them prompts",
                "held-out tokens",
            ),
            [_source_row(source) for source in data.sources],
        ),
        f"Tokens are those of a byte-level BPE with {data.vocab_size:,} entries. Prompts are read and not learned. Held-out "
        f"documents ({recipe.data.held_out:.1%} of each source) are for evaluation only.",
        "## What was dropped",
        bullets(rules),
        table(("source", "rule", "documents"), _dropped(data.sources)),
        *_bad_rows(data.sources),
        *_quality(data.sources),
        "## Blend",
        blend_table(recipe, data),
        "## Make it again",
        code(f"tandem train {recipe.name}") + f"\n\nprepares the data first. Fingerprint `{data.fingerprint}`.",
        "## Limits",
        "Generated problems have few templates, so a model learns their wording as much as their arithmetic. Read texts are as "
        "they were published: their facts are of their time, and persons are named in them. Nothing was filtered for tone.",
        "## Licences and notices",
        bullets(notice_lines(data)),
        notices.strip(),
    ]
    return card(front, parts)


def _hub_licence(licence: str) -> str:
    return _LICENCES.get(licence.strip().lower(), "other")


def blend_table(recipe: Recipe, data: DataReport) -> str:
    """Sources with their tokens, and their shares of the sequences until which part of the run."""
    phases = recipe.data.phases
    rows = []
    for source in data.sources:
        shares = [phase.weights.get(source.name, 0.0) / math.fsum(phase.weights.values()) for phase in phases]
        size = (source.licence, f"{source.documents:,}", f"{source.tokens:,}")
        rows.append((source.name, *size, *(f"{share:.0%}" for share in shares)))
    head = ("source", "licence", "documents", "tokens", *(f"sequences until {phase.until:.0%} of the run" for phase in phases))
    return table(head, rows)


def notice_lines(data: DataReport) -> list[str]:
    """What the licences of the sources ask for, a line each."""
    return [f"{source.name}: {source.licence}" + (f". {source.notice}" if source.notice else "") for source in data.sources]


def _source_row(source: SourceReport) -> tuple[str, ...]:
    numbers = (
        source.read, source.documents, source.held_out_documents, source.chars, source.tokens, source.prompt_tokens,
        source.held_out_tokens,
    )  # fmt: skip
    return (source.name, source.kind, source.licence, *(f"{number:,}" for number in numbers))


def _dropped(sources: Sequence[SourceReport]) -> list[tuple[str, str, str]]:
    return [(s.name, rule, f"{count:,}") for s in sources for rule, count in s.dropped.items() if count]


def _bad_rows(sources: Sequence[SourceReport]) -> list[str]:
    rows = [(s.name, f"{s.bad_rows:,}", "; ".join(map(_bad_row, s.first_bad_rows[:3]))) for s in sources if s.bad_rows]
    return ["Rows that could not be read, skipped:", table(("source", "rows", "the first of them"), rows)] if rows else []


def _bad_row(row: BadRow) -> str:
    return f"{row.file} line {row.line}: {row.why}"


def _quality(sources: Sequence[SourceReport]) -> list[str]:
    buckets = list(dict.fromkeys(bucket for source in sources for bucket in source.quality))
    rows = [(s.name, *(f"{s.quality.get(bucket, 0):,}" for bucket in buckets)) for s in sources if s.quality]
    return ["Kept documents by quality:", table(("source", *buckets), rows)] if rows else []
