"""A Ray cluster to host workers: one started here for as long as the server lives, or one that runs already.

Ray's usage statistics, its dashboard and its messages are off: the server's output is its own. Ray asks for a token on every
connection and keeps it in the user's home folder; a cluster of other machines must have been given the same.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

log = logging.getLogger("tandem.serve")

CONNECT_S = 10.0
"""A head node that does not take a connection within this time is not there."""


class RayCluster:
    """Joins the cluster at `address`: `ray` starts one on this machine, `auto` finds one here, else `host:port` of its head or
    `ray://host:port` of its client server. Tandem must be installed on every node.

    Raises SpecError where there is none. A process has one connection; one that was there before is used and left open.
    """

    def __init__(self, address: str = "ray", *, object_store_bytes: int | None = None) -> None:
        if address not in ("ray", "auto") and not re.fullmatch(r"(ray://)?[^\s/:]+:\d{1,5}", address):
            raise SpecError(f"cluster={address!r}: must be ray, auto, host:port or ray://host:port")
        if object_store_bytes is not None:
            require_int("object_store_bytes", object_store_bytes, low=1 << 26, high=1 << 46)
        self.address = address
        self._ours = not ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            _join(address, object_store_bytes)
            self._printing, ray_worker.print_to_stdstream = ray_worker.print_to_stdstream, _log

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of its live nodes, in an order that stays."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return tuple(sorted(node["NodeID"] for node in nodes if node["Alive"]))

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        if self._ours:
            self._ours = False
            ray.shutdown()
            ray_worker.print_to_stdstream = self._printing


def placement(node: str | None) -> str | NodeAffinitySchedulingStrategy:
    """Where Ray puts a worker: on that node while it lives, or wherever the fewest are."""
    return "SPREAD" if node is None else NodeAffinitySchedulingStrategy(node_id=node, soft=True)


def _log(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Ray would print this on stdout, where the server has its one line of JSON; it has no option against that."""
    for line in data.get("lines", ()):
        log.debug("ray: %s", line)


def _join(address: str, object_store_bytes: int | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "ray":
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": object_store_bytes}
    else:
        options["address"] = address
    try:
        if address not in ("ray", "auto"):  # Ray itself gives up only after minutes
            host, port = address.removeprefix("ray://").split(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(**options)
    except (RayError, ConnectionError, RuntimeError, ValueError, OverflowError, OSError) as wrong:
        reason = " ".join(str(wrong).split())[:200]
        raise SpecError(f"cluster={address!r}: cannot be joined ({type(wrong).__name__}: {reason})") from None
