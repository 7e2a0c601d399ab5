"""`tandem study`: one command for each study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

study = typer.Typer(help="Re-derive a paper, claim by claim.", no_args_is_help=True, rich_markup_mode=None)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object (SI units) on stdout.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the HTML report and claims.json.")]


@study.command("paper-a")
def study_paper_a(
    reruns: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            help="claims.json of `study pretraining`, `alignment` or `compression`, or what benchmarks/headline.py wrote; "
            "repeat it for several.",
        ),
    ] = None,
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Nemotron Nano 2: sizes, memory, the search for the 9B, throughput; with --with also what was trained here."""
    from tandem.cli import studying

    studying.run_paper_a(reruns or [], out, json_out)


@study.command("paper-b")
def study_paper_b(
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Beyond the Buzz: when to disaggregate, in which proportion; every finding beside the printed one."""
    from tandem.cli import studying

    studying.run_paper_b(out, json_out)


@study.command("joint")
def study_joint(
    gpus: Annotated[int, typer.Option(help="GPU budget of every deployment.")] = 16,
    hardware: Annotated[str, typer.Option(help="GPU name (`tandem hardware` lists them) or a YAML file.")] = "h100-sxm",
    ttft: Annotated[float, typer.Option(help="Largest time to first token, seconds.")] = 4.0,
    load: Annotated[float, typer.Option(help="Requests/s that GPUs are counted for.")] = 50.0,
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Which model, deployed how: paper A's compression candidates with paper B's best deployment of each; elastic on top."""
    from tandem.cli import studying
    from tandem.study.joint_space import Setting

    setting = Setting(gpus=gpus, hardware=hardware, ttft_s=ttft, load_rps=load)
    studying.run_joint(setting, out, json_out)


@study.command("hybrids")
def study_hybrids(
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Mamba-2 hybrids beside Transformers of their size: which traffic makes splitting worth it, and what moves."""
    from tandem.cli import studying

    studying.run_hybrids(out, json_out)


@study.command("elastic")
def study_elastic(
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short synthetic traffic for one model, in seconds.")] = False,
    json_out: Json = False,
) -> None:
    """Scaling policies on the same arrivals: constant sizes, published controllers, the joint policy, a clairvoyant."""
    from tandem.cli import studying

    studying.run_elastic(out, quick, json_out)


@study.command("pretraining")
def study_pretraining(
    runs: Annotated[Path, typer.Argument(help="Folder of runs that benchmarks/pretraining_runs.py made.")],
    out: Out = None,
    json_out: Json = False,
) -> None:
    """FP8 beside bf16, hybrid beside Transformer, three phases beside one blend, long context: finished runs, seed by seed."""
    from tandem.cli import studying

    studying.run_pretraining(runs, out, json_out)


@study.command("alignment")
def study_alignment(
    runs: Annotated[Path, typer.Argument(help="Folder of runs that benchmarks/alignment_runs.py made.")],
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Stages, thinking and its budget, truncated thoughts, GRPO, merging, hybrid beside Transformer: finished runs, by seed."""
    from tandem.cli import studying

    studying.run_alignment(runs, out, json_out)


@study.command("compression")
def study_compression(
    runs: Annotated[Path, typer.Argument(help="Folder of runs that benchmarks/compression_runs.py made.")],
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Pruned beside scratch, distilled beside the next token, groups, depth beside width, recovery: finished runs, by seed."""
    from tandem.cli import studying

    studying.run_compression(runs, out, json_out)
