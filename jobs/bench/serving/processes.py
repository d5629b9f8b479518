"""The processes of Ray Serve: which is what, how much memory they take, and how one of them dies."""

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from ray._private import state
from ray.serve._private.constants import SERVE_CONTROLLER_NAME

from jobs.bench.serving.sampling import Samples
from pipelines.serving.app import APP_NAME
from slq.errors import ServiceError

CONTROLLER, PROXY = "controller", "proxy"
KINDS = ("ingress", "backbone", "index", "partition")
_CLASSES = {"Ingress": "ingress", "BackboneService": "backbone", "IndexService": "index"}
_REPLICA, _PROXY_ACTOR = "SERVE_REPLICA::", "SERVE_PROXY_ACTOR"


@dataclass(frozen=True, slots=True)
class Actor:
    """A living actor of Ray Serve.

    Attributes:
        name: As Serve calls it.
        pid: Of its process.
    """

    name: str
    pid: int

    @property
    def deployment(self) -> str:
        """Its deployment's name, of a replica of our service; empty for others."""
        if not self.name.startswith(f"{_REPLICA}{APP_NAME}#"):
            return ""
        return self.name.split("#")[1]

    @property
    def kind(self) -> str:
        """`ingress`, `backbone`, `index`, `partition`, `controller`, `proxy`, or another deployment's name.

        Empty for other applications' replicas.
        """
        if self.name == SERVE_CONTROLLER_NAME:
            return CONTROLLER
        if self.name.startswith(_PROXY_ACTOR):
            return PROXY
        if self.deployment.startswith("Partition"):
            return "partition"
        return _CLASSES.get(self.deployment, self.deployment)


def living(table: dict[str, dict[str, Any]]) -> list[Actor]:
    """Serve's actors that live, from Ray's table of actors by id."""
    return [
        Actor(row["Name"], row["Pid"])
        for row in table.values()
        if row["State"] == "ALIVE" and row["Name"].startswith("SERVE_")
    ]


def serve_actors() -> list[Actor]:
    """Serve's actors that live now, also while its controller does not.

    `ray.util.state.list_actors` would tell the same, but in Ray 2.60 it asks the dashboard, which our local Ray is
    started without.
    """
    return living(state.actors())


def pick(actors: Sequence[Actor], kind: str, rng: random.Random) -> Actor:
    """One actor of a kind.

    Raises:
        ServiceError: None lives.
    """
    found = sorted((one for one in actors if one.kind == kind), key=lambda one: one.name)
    if not found:
        kinds = ", ".join(sorted({one.kind for one in actors if one.kind}))
        raise ServiceError(f"no process of kind {kind!r} lives; there are {kinds or 'none'}")
    return rng.choice(found)


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def signal_to(actor: Actor, number: int) -> None:
    """Send a signal to an actor's process; it may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(actor.pid, number)


def resident_bytes() -> dict[str, int]:
    """Bytes of Serve's processes by kind, each with its children (a proxy may have others work for it)."""
    found: dict[str, int] = defaultdict(int)
    for actor in serve_actors():
        with suppress(psutil.Error):  # it ended meanwhile
            process = psutil.Process(actor.pid)
            for one in (process, *process.children(recursive=True)):
                found[actor.kind or "other"] += one.memory_info().rss
    return dict(found)


def memory_figures(samples: Samples) -> dict[str, Any]:
    """Growth of resident memory: slopes of straight lines, the largest over the first, and each kind's ends.

    Queues and threads grow when an overload begins and stay so: what goes on growing shows in the second half's slope.

    Args:
        samples: (time in s, bytes by kind), ascending; at least two.
    """
    times = np.array([at - samples[0][0] for at, _ in samples])
    mib = np.array([sum(kinds.values()) for _, kinds in samples]) / 2**20
    half = len(samples) // 2
    names = sorted({name for _, kinds in samples for name in kinds})
    return {
        "slope_mib_per_min": _slope(times / 60, mib),
        "second_half_slope_mib_per_min": _slope(times[half:] / 60, mib[half:]),
        "max_to_first": round(float(mib.max() / mib[0]), 4),
        "first_mib": round(float(mib[0]), 1),
        "max_mib": round(float(mib.max()), 1),
        "last_mib": round(float(mib[-1]), 1),
        "first_and_last_mib": {
            name: [round(samples[n][1].get(name, 0) / 2**20, 1) for n in (0, -1)] for name in names
        },
        "seconds": times.round(2).tolist(),
        "mib": mib.round(2).tolist(),
    }


def _slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Of the straight line with the least squares; 0 of a single point."""
    return round(float(np.polyfit(x, y, 1)[0]), 2) if len(x) > 1 else 0.0
