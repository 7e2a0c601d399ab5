"""Shell scripts that start a deployment without an orchestrator: one for each host, one for the router, and the hosts."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from tandem.plan.export.flags import Flag, Shell, shell
from tandem.plan.export.job import Instance, Job
from tandem.plan.export.placement import Place, num_nodes, place

HEAD = "#!/usr/bin/env bash\n"
API_PORT, MASTER_PORT, ROUTER_PORT = 8100, 29500, 8000
"""First port of a host's servers, first port at which the ranks of an instance meet, and the port of the router."""


class Release(NamedTuple):
    """What a script runs: its name, the package to install and the version that its options were checked with."""

    title: str
    package: str
    version: str


def blocked(limits: list[str]) -> list[str]:
    """Those limits that keep a deployment from running at all; the files say them at their head."""
    return [line for line in limits if line.startswith("will not")]


def nodes_file(job: Job) -> str:
    """`nodes.env`: addresses of the hosts and the weights, the only things that a script asks a person."""
    count = num_nodes(place(job))
    names = "127.0.0.1" if count == 1 else " ".join(f"node{i}" for i in range(count))
    each = job.instances[0].gpus_per_node
    name = job.checkpoint.name
    model = f'PUBLISHED={shlex.quote(name or "")}\nMODEL="${{MODEL:-$PUBLISHED}}"\n'
    return (
        f"# Hosts, in order: put addresses here that every other host can reach. Each has {each} GPUs.\n"
        f"NODES=({names})\n"
        "# Weights: a hub id, or a folder that every host has at the same path.\n"
        f"{model}"
    )


def function_head(i: Instance) -> str:
    """First lines of the function that starts a part of an instance."""
    return f"start_{i.role}() {{  # rank, leader, GPUs, slot\n  local rank=$1 leader=$2 gpus=$3 slot=$4"


def node_script(job: Job, release: Release, functions: str, environment: dict[str, str], limits: list[str]) -> str:
    """The script that starts everything of one host and waits; any part that ends, ends the script with its status."""
    places = place(job)
    cases = []
    for node in range(num_nodes(places)):
        lines = [
            f'    start_{p.instance.role} {p.rank} "${{NODES[{p.leader}]}}" {p.gpus} {_slot(places, p)} &'
            for p in places
            if p.node == node
        ]
        cases.append("\n".join([f"  {node})", *lines, "    ;;"]))
    exports = "".join(f"export {name}={value}\n" for name, value in environment.items())
    return (
        f"{HEAD}# {release.title} {release.version}: starts the instances of one host. Usage: run-node.sh HOST_NUMBER "
        f"(0 to {num_nodes(places) - 1})\n"
        f"# Needs: pip install '{release.package}=={release.version}'. Addresses and weights: ../nodes.env\n"
        f"{''.join(f'# {line}' + chr(10) for line in blocked(limits))}"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        "source ../nodes.env\n"
        'node="${1:?the number of this host}"\n'
        f': "${{MODEL:?set it to a checkpoint in {job.checkpoint.wanted}}}"\n'
        'here="${NODES[$node]:?host $node has no address in nodes.env}"\n'
        f"API_PORT={API_PORT}\n"
        f"MASTER_PORT={MASTER_PORT}\n"
        f"{exports}\n{functions}\n\n"
        "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
        'case "$node" in\n'
        + "\n".join(cases)
        + '\n  *)\n    echo "no host $node in this deployment" >&2\n    exit 2\n    ;;\nesac\n'
        "wait -n\n"
    )


def _slot(places: list[Place], part: Place) -> int:
    """The slot of the leading part: ports of an instance are those of its leader's slot on every host."""
    return next(p.slot for p in places if (p.instance.role, p.number, p.rank) == (part.instance.role, part.number, 0))


def url(p: Place) -> Shell:
    """Address of an instance, its host still a shell variable."""
    return Shell(f"http://${{NODES[{p.node}]}}:{API_PORT + p.slot}")


def router_script(package: str, command: str, flags: list[Flag]) -> str:
    """The script that starts a router in front of all instances."""
    return (
        f"{HEAD}# Router in front of all instances: clients talk to its port. Start it once they answer /health.\n"
        f"# Needs: pip install '{package}'. Addresses: ../nodes.env\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        "source ../nodes.env\n"
        f"exec {command} \\\n{shell(flags, '  ')}\n"
    )
