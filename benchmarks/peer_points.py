"""Points per second of aiconfigurator 0.12.0, in one process. Runs inside the peer's own environment, not in ours.

Its quickest path: model, database and session are built once, outside the clock, and every point of `run_agg` has an
input length, a batch and a share of context tokens that was not asked before, so that none comes whole out of a cache.

    python peer_points.py MODEL SYSTEM TP EP SEED SECONDS    ->  {"points": ..., "seconds": ...}
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.ERROR)


def main() -> None:
    from aiconfigurator.sdk import config
    from aiconfigurator.sdk.backends.factory import get_backend
    from aiconfigurator.sdk.inference_session import InferenceSession
    from aiconfigurator.sdk.models import get_model, resolve_context_fmha_by_data
    from aiconfigurator.sdk.perf_database import get_database, get_latest_database_version

    path, system = sys.argv[1:3]
    tp, ep, seed, limit_s = (int(word) for word in sys.argv[3:7])
    database = get_database(system, "trtllm", get_latest_database_version(system, "trtllm"))
    layout = config.ModelConfig(tp_size=tp, pp_size=1, attention_dp_size=1, moe_tp_size=tp // ep, moe_ep_size=ep)
    resolve_context_fmha_by_data(layout, path, database, "trtllm", is_context_role=True)
    session = InferenceSession(get_model(path, layout, "trtllm"), database, get_backend("trtllm"))
    draw = random.Random(seed)
    lengths = draw.sample(range(512, 8192), 7680)
    points = [(isl, draw.randint(1, 64), draw.randint(512, 8192)) for isl in lengths]
    start, count = time.perf_counter(), 0
    for isl, batch, context in points:
        session.run_agg(config.RuntimeConfig(isl=isl, osl=1024, batch_size=batch), ctx_tokens=context)
        count += 1
        if time.perf_counter() - start > limit_s:
            break
    print(json.dumps({"points": count, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
