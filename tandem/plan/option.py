"""One deployment with what it is predicted to do, what it holds and moves, and what limits it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tandem.perf.costs import Layout, StepLoad
from tandem.perf.estimate import intervals, memory_json
from tandem.perf.ops import NETWORK, Array
from tandem.perf.phases import Basis, PerfModel
from tandem.perf.pools import exposed_transfer_s
from tandem.plan.search import Choice, Priced, Searched
from tandem.spec.design import Deployment, Estimate, Mode, Pool, Role

MODES: tuple[Mode, ...] = ("colocated", "piggybacked", "disaggregated")
MATCHED_LOW = 0.75
"""Real disaggregated systems reach 75 to 100 % of a rate-matched curve (TensorRT-LLM tech blog 5): the interval's lower end."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One deployment with what it is predicted to do and what limits it."""

    deployment: Deployment
    ttft_s: Estimate
    tpot_s: Estimate
    tokens_per_s_per_gpu: Estimate
    tokens_per_s_per_user: Estimate
    tokens_per_s: float
    requests_per_s: float
    imbalance: float
    prefill_requests_per_s: float | None
    decode_requests_per_s: float | None
    transfer: dict[str, float] | None
    memory: dict[str, dict[str, float]]
    time_by_class: dict[str, dict[str, dict[str, float]]]
    binds: dict[str, str]

    def gpus_for(self, requests_per_s: float) -> int:
        """GPUs that carry this load with instances as they are here: whole instances of each pool, at least one."""
        rates = {
            "colocated": self.requests_per_s / self.deployment.pools[0].replicas,
            "prefill": self.prefill_requests_per_s or 0.0,
            "decode": self.decode_requests_per_s or 0.0,
        }
        return sum(math.ceil(requests_per_s / rates[p.role]) * p.parallelism.gpus for p in self.deployment.pools)

    def to_json(self) -> dict[str, Any]:
        """Its fields as one JSON object; pools become `prefill`, `decode` or `colocated` beside `n_prefill`, `n_decode`."""
        data = {k: v for k, v in asdict(self).items() if k != "deployment" and v is not None}
        d = self.deployment
        data |= {"mode": d.mode, "gpus": d.gpus}
        for pool in d.pools:
            data[pool.role] = asdict(pool)
        if d.prefill is not None and d.decode is not None:
            data |= {"n_prefill": d.prefill.replicas, "n_decode": d.decode.replicas}
            data["prefill"] |= {"requests_per_s": self.prefill_requests_per_s, "ttft_s": self.ttft_s.value}
            data["decode"] |= {"requests_per_s": self.decode_requests_per_s, "tpot_s": self.tpot_s.value}
        return data


@dataclass(frozen=True)
class OptionMaker:
    """Turns rows of the priced tables into options that explain themselves."""

    searched: Searched

    @property
    def _perf(self) -> PerfModel:
        return self.searched.perf

    def option(self, choice: Choice) -> Option:
        """The option behind a choice, with its memory, time by class and what binds."""
        pools = self._pools(choice)
        return self._option(choice, pools, Basis.weakest([bases[0] for bases in self._bases([pools])]), detail=True)

    def options(self, choices: Sequence[Choice]) -> list[Option]:
        """Options without that detail: what many of them rest on is found at once."""
        found = []
        for mode in MODES:
            chosen = [choice for choice in choices if choice.mode == mode]
            pools = [self._pools(choice) for choice in chosen]
            rests = zip(*self._bases(pools), strict=True)
            found += [
                self._option(choice, each, Basis.weakest(list(bases)), detail=False)
                for choice, each, bases in zip(chosen, pools, rests, strict=True)
            ]
        return found

    def _pools(self, choice: Choice) -> dict[Role, Pool]:
        """The pools of a choice by what they do."""
        s = self.searched
        if choice.mode != "disaggregated":
            return {"colocated": _pool(s.priced[choice.mode], choice.row, choice.replicas, "colocated")}
        assert choice.prefill_row is not None
        return {
            "prefill": _pool(s.priced["prefill"], choice.prefill_row, choice.num_prefill, "prefill"),
            "decode": _pool(s.priced["decode"], choice.row, choice.replicas, "decode"),
        }

    def _bases(self, deployments: Sequence[dict[Role, Pool]]) -> list[list[Basis]]:
        """What each pool of equally built deployments rests on: a list for each role, in the deployments' order."""
        found = []
        for role in deployments[0] if deployments else ():
            pools = [each[role] for each in deployments]
            sizes = np.array([(p.tp, p.pp, p.ep, p.dp, p.cpp) for p in (pool.parallelism for pool in pools)], dtype=float)
            layout = Layout(*sizes.T)
            batch = np.array([float(pool.batch) for pool in pools])
            chunk = np.array([np.inf if pool.chunk_tokens is None else float(pool.chunk_tokens) for pool in pools])
            as_measured = role != "colocated" or pools[0].chunk_tokens is None
            found.append(self._perf_of(role).bases(layout, self._load(role, layout, batch, chunk), as_measured=as_measured))
        return found

    def _option(self, choice: Choice, pools: dict[Role, Pool], basis: Basis, *, detail: bool) -> Option:
        s, split = self.searched, choice.mode == "disaggregated"
        main = s.priced["decode" if split else choice.mode]
        tables = {"colocated": (choice.mode, choice.row), "decode": ("decode", choice.row)}
        ttft = float(main.ttft_s[choice.row])
        if split:
            assert choice.prefill_row is not None
            tables["prefill"] = "prefill", choice.prefill_row
            ttft = float(s.priced["prefill"].ttft_s[choice.prefill_row])
        deployment = Deployment(
            model=self._perf.model.name,
            hardware=self._perf.hardware.name,
            backend=self._perf.backend,
            precision=self._perf.precision,
            **pools,
        )
        tpot = float(main.tpot_s[choice.row])
        rate = choice.requests_per_s
        return Option(
            deployment=deployment,
            **self._estimates(deployment, ttft, tpot, rate, basis),
            tokens_per_s=rate * s.workload.mean_osl,
            requests_per_s=rate,
            imbalance=choice.imbalance,
            prefill_requests_per_s=float(s.priced["prefill"].requests_per_s[choice.prefill_row]) if split else None,
            decode_requests_per_s=float(main.requests_per_s[choice.row]) if split else None,
            transfer=self._transfer(choice) if split else None,
            memory={role: self._memory(*tables[role]) for role in pools} if detail else {},
            time_by_class={role: self._breakdown(pool) for role, pool in pools.items()} if detail else {},
            binds={role: self._binds(pool, main, choice) for role, pool in pools.items()} if detail else {},
        )

    def _estimates(self, deployment: Deployment, ttft: float, tpot: float, rate: float, basis: Basis) -> dict[str, Estimate]:
        pool = deployment.decode or deployment.colocated
        assert pool is not None
        return intervals(
            self._perf_of(pool.role),
            Layout.of(pool.parallelism),
            self._load_of(pool),
            ttft_s=ttft,
            tpot_s=tpot,
            tokens_per_s_per_gpu=rate * self.searched.workload.mean_osl / deployment.gpus,
            margin=MATCHED_LOW if deployment.mode == "disaggregated" else 1.0,
            basis=basis,
        )

    def _perf_of(self, role: Role) -> PerfModel:
        return self._perf if role == "colocated" else self.searched.pools_perf

    def _load_of(self, pool: Pool) -> StepLoad:
        chunk = np.inf if pool.chunk_tokens is None else float(pool.chunk_tokens)
        return self._load(pool.role, Layout.of(pool.parallelism), float(pool.batch), chunk)

    def _load(self, role: Role, layout: Layout, batch: Array, chunk_tokens: Array) -> StepLoad:
        if role == "prefill":
            seqs = np.ceil(batch / (layout.dp * layout.pp))
            isl = self.searched.workload.mean_isl
            return StepLoad(prefill_seqs=seqs, isl=isl, chunks=np.maximum(1.0, np.ceil(seqs * isl / chunk_tokens)))
        return self._perf.decode_load(layout, batch, self.searched.workload)

    def _breakdown(self, pool: Pool) -> dict[str, dict[str, float]]:
        load = self._load_of(pool)
        classes = self._perf.pricer.breakdown(Layout.of(pool.parallelism), load)
        fit = self._perf_of(pool.role).backend_fit
        host = fit.step_s + fit.sequence_s * (float(load.decode_seqs) + float(load.prefill_seqs))
        return {**classes, "host": {"seconds": host, "fixed": host, "compute": 0.0, "moved": 0.0}}

    def _binds(self, pool: Pool, priced: Priced, choice: Choice) -> str:
        """The resource that takes the largest share of a step, and the memory limit where the batch has reached it."""
        classes = self._breakdown(pool)
        shares = {
            "compute": sum(c["compute"] for c in classes.values()),
            "memory bandwidth": sum(c["moved"] for k, c in classes.items() if k not in NETWORK),
            "network": sum(c["seconds"] for k, c in classes.items() if k in NETWORK),
            "launch and host overhead": sum(c["fixed"] for k, c in classes.items() if k not in NETWORK),
        }
        name = max(shares, key=lambda k: shares[k])
        text = f"{name} ({shares[name] / sum(shares.values()):.0%} of a step)"
        if pool.role != "prefill" and pool.batch * 1.07 > float(priced.max_batch[choice.row]):
            text += "; memory capacity caps the batch"
        return text

    def _memory(self, table: str, row: int) -> dict[str, float]:
        """Bytes on the fullest GPU at a row of a priced table, as the search counted them."""
        points = self.searched.priced[table].points
        point = points.take(np.array([row]))
        use = self.searched.memory_use(table, point)
        return memory_json(self._perf, Layout.of(points.parallelism(row)), use, float(point.batch[0]))

    def _transfer(self, choice: Choice) -> dict[str, float]:
        """Bytes a request moves between the pools and the bandwidth that takes, per GPU (paper B, Equations 1 and 2)."""
        s, model, precision = self.searched, self._perf.model, self._perf.precision
        assert choice.prefill_row is not None
        p, d = s.priced["prefill"], s.priced["decode"]
        rows = np.array([choice.prefill_row]), np.array([choice.row])
        prompt = round(s.workload.mean_isl)
        out = self._perf.memory.sequence_bytes(p.points.take(rows[0]).layout, s.workload.mean_isl)
        into = self._perf.memory.sequence_bytes(d.points.take(rows[1]).layout, s.workload.mean_isl)
        each_p = choice.requests_per_s / choice.num_prefill / np.asarray(p.points.layout.dp)[choice.prefill_row]
        each_d = choice.requests_per_s / choice.replicas / np.asarray(d.points.layout.dp)[choice.row]
        state = model.state_bytes_per_sequence(state=precision.state)
        return {
            "state_bytes_per_request": float(state),
            "kv_bytes_per_token": float(model.kv_bytes_per_token(kv=precision.kv)),
            "bytes_per_request": float(state + model.kv_bytes(prompt, kv=precision.kv)),
            "egress_bytes_per_s_per_gpu": float(out[0] * each_p),
            "ingress_bytes_per_s_per_gpu": float(into[0] * each_d),
            "link_bytes_per_s_per_gpu": self._perf.hardware.scale_out_bytes_per_s,
            "windowed": float(model.kv_bytes(prompt, kv=precision.kv) < prompt * model.kv_bytes_per_token(kv=precision.kv)),
            "exposed_s": float(exposed_transfer_s(self._perf, p.points.take(rows[0]).layout, s.workload, p.ttft_s[rows[0]])[0]),
        }


def _pool(priced: Priced, row: int, replicas: int, role: Role) -> Pool:
    chunk = float(priced.points.chunk_tokens[row])
    return Pool(
        parallelism=priced.points.parallelism(row),
        batch=int(priced.points.batch[row]),
        replicas=replicas,
        role=role,
        chunk_tokens=int(chunk) if np.isfinite(chunk) else None,
    )
