from __future__ import annotations

import numpy as np
import pytest

from tandem.plan.planner import find_plan
from tandem.sim.build import config_of
from tandem.sim.simulate import run
from tandem.spec.workload import Slo, Trace, Workload

CASES = [
    ("qwen3-8b", "h100-sxm", 8, 4000, 500),
    ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "h100-sxm", 8, 8000, 1000),
    ("llama-3.1-70b", "h200-sxm", 16, 16000, 500),
]


@pytest.mark.parametrize(("model", "hardware", "gpus", "isl", "osl"), CASES)
def test_a_saturated_simulation_finishes_what_the_plan_promises(
    model: str, hardware: str, gpus: int, isl: int, osl: int
) -> None:
    plan = find_plan(
        model=model, hardware=hardware, gpus=gpus, workload=Workload.fixed(isl, osl), slo=Slo(ttft_s=2.0, tpot_s=0.03)
    )
    count = 2000
    for option in (plan.colocated, plan.disaggregated):
        assert option is not None
        trace = Trace(
            name="twice the rate",
            arrival_s=np.arange(count) / (2 * option.requests_per_s),
            isl=np.full(count, isl, dtype=np.int64),
            osl=np.full(count, osl, dtype=np.int64),
        )
        result = run(config_of(option.deployment, trace=trace), trace).requests
        assert result.completed.all()
        done = np.sort(result.done_s)[[count // 5, count * 4 // 5]]
        assert 0.6 * count / (done[1] - done[0]) == pytest.approx(option.requests_per_s, rel=0.08)
