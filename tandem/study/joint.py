"""Which model, deployed how? Paper A's compression candidates, each with the best deployment that a search as paper B's finds.

Neither paper asks this. Read first: joint_space.py (which shapes, which traffic), joint_claims.py (what is asked of shapes),
joint_split.py and joint_transfer.py (what turns the decision to split), joint_elastic.py (scaling on top). What a shape is
worth in accuracy is not known here: its parameters stand for it, which order models of one family and training.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tandem.plan.rates import TOLERANCE
from tandem.study.joint_claims import BACKEND, bytes_claim, moved_claim, service_claim, winner_claim
from tandem.study.joint_elastic import ALIKE, SLO, TRAFFIC, WANTED, elastic_claim, elastic_figure, outcomes
from tandem.study.joint_figures import plane, plane_rows, shape_row
from tandem.study.joint_space import (
    CHOSEN,
    DEPTHS,
    TPOTS_S,
    WHOLE,
    Setting,
    candidates,
    transformers,
)
from tandem.study.joint_space import TRAFFIC as LENGTHS
from tandem.study.joint_split import answer_rows, answers_figure, compression_claim, gains_figure, transformer_claim
from tandem.study.joint_transfer import transfer_claim, transfer_figure, transfers
from tandem.study.result import StudyResult


def study_joint(setting: Setting | None = None, progress: Callable[[str], None] = lambda _: None) -> StudyResult:
    """Judge what compression and deployment do to each other, by default on 16 H100.

    Raises SpecError where neither the 12B nor the 9B can be served.
    """
    started = time.perf_counter()
    setting = setting or Setting()
    shapes = candidates(setting, progress)
    progress("Transformers")
    peers = transformers(setting)
    models = {"12B": shapes[WHOLE], "9B": shapes[CHOSEN], **peers}
    rows = answer_rows({title: c.spec for title, c in models.items()}, setting)
    progress("transfers")
    moved = transfers(shapes[CHOSEN].spec, setting)
    scaled = outcomes(setting, progress)
    claims = (
        winner_claim(shapes),
        service_claim(shapes),
        bytes_claim(shapes),
        compression_claim(shapes),
        moved_claim(shapes),
        elastic_claim(scaled),
        transformer_claim(shapes[CHOSEN], peers, rows),
        transfer_claim(moved),
    )
    plans = [plan for c in (*shapes.values(), *peers.values()) for plan in c.plans.values()]
    plans += [plan for row in rows.values() for plan in row.values()]
    points = sum(plan.points_evaluated for plan in plans if plan is not None) + moved.points_evaluated
    return StudyResult(
        study="joint",
        claims=claims,
        figures={
            **plane(shapes, peers, setting),
            "gain": gains_figure(models),
            "turn": answers_figure(rows),
            "transfer": transfer_figure(moved),
            "elastic": elastic_figure(scaled),
        },
        assumptions=assumptions(setting),
        errata=(),
        findings={
            "setting": {
                "gpus": setting.gpus,
                "hardware": setting.hardware,
                "ttft_s": setting.ttft_s,
                "load_rps": setting.load_rps,
            },
            "plane": plane_rows(models, setting),
            "shapes": [shape_row(c, setting) for c in shapes.values()],
            "transformers": {title: shape_row(c, setting) for title, c in peers.items()},
            "transfers": moved.to_json(),
            "elastic": {name: outcome.to_json() for name, outcome in scaled.items()},
        },
        backends={BACKEND: "fitted on measured rows of the engine that paper A ran; none is of a Mamba-2 hybrid"},
        points_evaluated=points,
        points_considered=points,
        seconds=time.perf_counter() - started,
    )


def assumptions(setting: Setting) -> tuple[str, ...]:
    """What the study rests on."""
    elastic = "; ".join(f"{name}: {a.trace}, {a.what}, {a.scale:g} times its rate" for name, a in TRAFFIC.items())
    lengths, bounds = (", ".join(f"{i}/{o}" for i, o in LENGTHS)), ", ".join(f"{t * 1e3:g}" for t in TPOTS_S)
    return (
        f"{setting.hardware}, {setting.gpus} GPUs, BF16, prompts and outputs of {lengths} tokens, TTFT up to "
        f"{setting.ttft_s:g} s and TPOT up to {bounds} ms; full load; pools are whole instances, balanced within "
        f"{TOLERANCE:.0%}",
        "shapes: the paper's grid of hidden size, FFN size and Mamba heads at "
        f"{' and '.join(map(str, DEPTHS))} layers of the 12B",
        "parameters stand for quality: they order models of one family, and say nothing of what a point of accuracy is worth",
        "no serving row of a Mamba-2 hybrid was ever measured, so all of this is transferred; ratios of shapes of one family "
        "are surer than numbers, and surer than those of a hybrid to a Transformer, whose rows were measured (J7)",
        "transfers (J8): only the bytes on the link are others; memory, kernels and cache stay the 9B's own. No pool hands "
        "over more than its links carry, which the planner does not ask",
        "elastic (J6): workers of one kind in both pools, so that roles can change; simulated request by request, sized by "
        f"the traffic and not by the budget. TTFT up to {SLO.ttft_s:g} s and TPOT up to {1e3 * (SLO.tpot_s or 0.0):g} ms for "
        f"{WANTED:.0%} of the requests; constant pools are the cheapest that keep that; attainments within {ALIKE:.0%} count "
        f"as equal. {elastic}",
    )
