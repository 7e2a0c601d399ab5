"""`tandem study`: run a study, print its claims, write its page and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from tandem.cli.app import emit
from tandem.report import text
from tandem.report.study_text import claims_table, study_sentences
from tandem.spec.errors import SpecError
from tandem.spec.files import write_whole

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tandem.study.joint_space import Setting

PAPER_A_TITLE = "Nemotron Nano 2, re-derived"
PAPER_A_LEAD = (
    "Paper A (arXiv 2508.14444) makes a 9B hybrid of a 12B so that 128k tokens fit one 22 GiB GPU, up to 6 times as fast as a "
    "Transformer of its size. Every number that can be re-derived stands beside the printed one, priced without a GPU."
)

PAPER_B_TITLE = "Beyond the Buzz, re-derived"
PAPER_B_LEAD = (
    "Paper B (arXiv 2506.05508) asks when prefill and decode should be served on separate GPUs. Every finding is set beside "
    "the printed number, priced by Tandem's performance model without a GPU; a claim that fails is explained with arithmetic."
)

JOINT_TITLE = "Which model, deployed how?"
JOINT_LEAD = (
    "Paper A searches for a smaller model, paper B for a deployment. Here every shape of paper A's search has the best "
    "deployment of its own, under traffic and bounds: what the two decisions do to each other, which neither paper asks; where "
    "a hybrid turns the decision to split, what the moved state changes, and what elastic scaling adds."
)

HYBRIDS_TITLE = "Hybrids: should prefill and decode be split?"
HYBRIDS_LEAD = (
    "Four Mamba-2 hybrids beside Transformers of their size on H100: what splitting prefill from decode gains each, in which "
    "proportion, what moves between the pools, and which traffic changes the answer. Nobody has published this; most claims "
    "have no printed number, and no measured serving row of a Mamba-2 hybrid stands behind the predictions."
)


ELASTIC_TITLE = "Elastic scaling: policies on the same arrivals"
ELASTIC_LEAD = (
    "Constant sizes, sizes for the peak, independent prefill and decode controllers as published, Tandem's joint policy and a "
    "clairvoyant serve the same requests, one by one: what share meets its objective, for how many GPU hours. And what a fixed "
    "prefill:decode ratio loses when the latency target or the traffic moves."
)

PRETRAINING_TITLE = "Pre-training at nano scale"
PRETRAINING_LEAD = (
    "Models of 3.6 million parameters, trained on two CPU cores in variants that differ in one thing each: what FP8, Mamba-2, "
    "three phases and a long-context phase are worth. Differences are taken seed by seed."
)

ALIGNMENT_TITLE = "Alignment at nano scale"
ALIGNMENT_LEAD = (
    "A hybrid and a Transformer of 4 million parameters, aligned in eight stages at several seeds: what each stage is worth, "
    "what thinking and its budget are, what truncated thoughts teach, and whether reinforcement learning and merging help. "
    "Differences are taken seed by seed."
)

COMPRESSION_TITLE = "Compression at nano scale"
COMPRESSION_LEAD = (
    "A hybrid of 4 million parameters cut to at most 70 % of its bytes and distilled from itself, in variants that differ in "
    "one thing each: what its weights, the teacher and the groups of Mamba heads are worth, depth beside width, and how far "
    "the compressed model is from its teacher. Differences are taken seed by seed."
)


def run_paper_a(reruns: list[Path], out: Path | None, json_out: bool) -> None:
    """Run the study of paper A; the exit code does not depend on which claims hold."""
    from tandem.study.paper_a import study_paper_a

    _require_writable(out, "paper-a")
    with text.progress("studying") as step:
        data = study_paper_a(reruns, progress=step).to_json()
    _finish("paper-a", PAPER_A_TITLE, PAPER_A_LEAD, data, out, json_out)


def run_paper_b(out: Path | None, json_out: bool) -> None:
    """Run the study of paper B; the exit code does not depend on which claims hold."""
    from tandem.study.paper_b import study_paper_b

    _require_writable(out, "paper-b")
    with text.progress("studying") as step:
        data = study_paper_b(progress=step).to_json()
    _finish("paper-b", PAPER_B_TITLE, PAPER_B_LEAD, data, out, json_out)


def run_joint(setting: Setting, out: Path | None, json_out: bool) -> None:
    """Run the joint study; the exit code does not depend on which claims hold."""
    from tandem.report.joint_html import joint_page, joint_tables
    from tandem.study.joint import study_joint

    _require_writable(out, "joint")
    with text.progress("studying") as step:
        data = study_joint(setting, progress=step).to_json()
    _finish("joint", JOINT_TITLE, JOINT_LEAD, data, out, json_out, page=joint_page, also=joint_tables)


def run_hybrids(out: Path | None, json_out: bool) -> None:
    """Run the study of hybrids; the exit code does not depend on which claims hold."""
    from tandem.study.hybrids import study_hybrids

    _require_writable(out, "hybrids")
    with text.progress("studying") as step:
        data = study_hybrids(progress=step).to_json()
    _finish("hybrids", HYBRIDS_TITLE, HYBRIDS_LEAD, data, out, json_out)


def run_elastic(out: Path | None, quick: bool, json_out: bool) -> None:
    """Run the study of elastic scaling; the exit code does not depend on which claims hold."""
    from tandem.report.elastic_html import elastic_page, elastic_sentences, policies_table
    from tandem.study.elastic import study_elastic

    _require_writable(out, "elastic")
    with text.progress("simulating") as step:
        data = study_elastic(progress=step, quick=quick).to_json()
    _finish(
        "elastic",
        ELASTIC_TITLE,
        ELASTIC_LEAD,
        data,
        out,
        json_out,
        page=elastic_page,
        also=policies_table,
        closing=elastic_sentences,
    )


def run_pretraining(runs: Path, out: Path | None, json_out: bool) -> None:
    """Judge finished runs; the exit code does not depend on which claims hold."""
    from tandem.report.pretraining_html import pretraining_page, pretraining_sentences, variants_table
    from tandem.study.pretraining import study_pretraining

    _require_writable(out, "pretraining")
    data = study_pretraining(runs).to_json()
    _finish(
        "pretraining",
        PRETRAINING_TITLE,
        PRETRAINING_LEAD,
        data,
        out,
        json_out,
        page=pretraining_page,
        also=variants_table,
        closing=pretraining_sentences,
    )


def run_alignment(runs: Path, out: Path | None, json_out: bool) -> None:
    """Judge finished runs; the exit code does not depend on which claims hold."""
    from tandem.report.alignment_html import alignment_sentences, alignment_study_page, alignment_table
    from tandem.study.alignment import study_alignment

    _require_writable(out, "alignment")
    data = study_alignment(runs).to_json()
    _finish(
        "alignment",
        ALIGNMENT_TITLE,
        ALIGNMENT_LEAD,
        data,
        out,
        json_out,
        page=alignment_study_page,
        also=alignment_table,
        closing=alignment_sentences,
    )


def run_compression(runs: Path, out: Path | None, json_out: bool) -> None:
    """Judge finished runs; the exit code does not depend on which claims hold."""
    from tandem.report.alignment_html import alignment_sentences
    from tandem.report.compression_study_html import compression_study_page, compression_table
    from tandem.study.compression import study_compression

    _require_writable(out, "compression")
    data = study_compression(runs).to_json()
    _finish(
        "compression",
        COMPRESSION_TITLE,
        COMPRESSION_LEAD,
        data,
        out,
        json_out,
        page=compression_study_page,
        also=compression_table,
        closing=alignment_sentences,
    )


def _require_writable(out: Path | None, name: str) -> None:
    """Refuse a folder that cannot be made or written into before any work is done for it; nothing of the trial stays."""
    if out is None:
        return
    made: list[Path] = []
    try:
        if out.exists() and not out.is_dir():
            raise SpecError(f"--out {out}: is a file; give a folder")
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as wrong:
        raise SpecError(
            f"--out {out}: cannot be written into ({wrong.strerror}); give a folder that you may write to"
        ) from None
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
    for file in _files(out, name):
        if file.is_dir():
            raise SpecError(f"--out {out}: {file.name} in it is a folder; remove it or give another one")


def _files(out: Path, name: str) -> tuple[Path, Path]:
    """The page and the numbers of a study."""
    return out / f"study-{name}.html", out / "claims.json"


def _finish(
    name: str,
    title: str,
    lead: str,
    data: dict[str, Any],
    out: Path | None,
    json_out: bool,
    page: Callable[[str, str, dict[str, Any]], str] | None = None,
    also: Callable[[dict[str, Any]], RenderableType] | None = None,
    closing: Callable[[dict[str, Any]], list[str]] = study_sentences,
) -> None:
    """Write the page and claims.json, then print; `page`, `also`, `closing`: a study's own page, table and last lines."""
    target = None
    if out is not None:
        from tandem.report.study_html import study_page

        out.mkdir(parents=True, exist_ok=True)
        target, numbers = _files(out, name)
        write_whole(target, (page or study_page)(title, lead, data))
        write_whole(numbers, json.dumps(data, allow_nan=False, indent=1) + "\n")
    if json_out:
        return emit(data)
    console = text.console()
    console.print(claims_table(title, data["claims"], list(data["backends"])))
    if also is not None:
        console.print(also(data))
    for line in closing(data):
        console.print(f"- {line}", markup=False)
    if target is not None:
        console.print(f"report: {target.resolve()}", soft_wrap=True, markup=False)
