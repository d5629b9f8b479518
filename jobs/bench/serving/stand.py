"""The test stand: a recipe's service, started as `slq serve` starts it, and what it is asked."""

import http.client
import json
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch

from jobs.bench.load.generator import Plan
from jobs.bench.load.sending import Outcome, Stream, send
from jobs.bench.measure import hardware
from jobs.console import generate_files
from pipelines.embed import embed
from pipelines.index import index
from pipelines.loading import backbone_of, encoder_of, untrained_latents
from pipelines.progress import show
from pipelines.provenance import cpu_name
from pipelines.recipe import Recipe, load_recipe
from pipelines.runtime import connect
from pipelines.serve import start, stop
from slq.artifacts import save_adapter
from slq.engines import FAISS

RECIPE = Path(__file__).parents[2] / "recipes" / "serving.yaml"
TEXT, EMBEDDING = "text", "embedding"
MODES = {"coarse": "coarse", "fine": "auto"}
"""What parts call their searches, and the service's `mode`."""
_NUM_QUERIES = 64
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Settings:
    """What a part is asked for.

    Attributes:
        recipe: The recipe file.
        overrides: `--set` values, which go before a part's own.
        out: Folder of everything that is written.
        seed: Of arrivals and victims.
        seconds: Length of a run; 0 leaves it to the part.
        repeats: Rounds; 0 leaves it to the part.
        deadline_ms: Within which an answer counts for goodput.
        modes: Searches of `overload` and `latency`: `coarse`, `fine`.
        rates: Requests per second of `latency`, `chaos` and `autoscale`; found out where empty.
        factors: Multiples of the peak's rate in `overload`.
        slow_clients: Held beside the load of `overload`.
        large_every_s: Between bodies of 100 MiB in `overload`; 0 for none.
        kinds: Of processes that `chaos` kills; all by default.
        signals: With which.
    """

    recipe: Path = RECIPE
    overrides: tuple[str, ...] = ()
    out: Path = Path("runs/bench-serve")
    seed: int = 0
    seconds: float = 0.0
    repeats: int = 0
    deadline_ms: float = 1000.0
    modes: tuple[str, ...] = ("coarse",)
    rates: tuple[float, ...] = ()
    factors: tuple[float, ...] = (2.0, 5.0)
    slow_clients: int = 0
    large_every_s: float = 0.0
    kinds: tuple[str, ...] = ()
    signals: tuple[str, ...] = ("KILL", "STOP")

    def rng(self, name: str) -> np.random.Generator:
        """A generator of random numbers for one purpose, so that one can be repeated without the others."""
        return np.random.default_rng([self.seed, *name.encode()])


@dataclass(frozen=True)
class Stand:
    """A running service.

    Attributes:
        url: Of it.
        recipe: Resolved.
        settings: What was asked for.
        texts: Queries.
        vectors: (n, dimension) float32 of them.
    """

    url: str
    recipe: Recipe
    settings: Settings
    texts: Sequence[str]
    vectors: np.ndarray[Any, np.dtype[np.float32]]

    def bodies(self, kind: str, mode: str = "coarse", **more: Any) -> list[str]:
        """Search bodies of all queries, by text or by embedding."""
        queries: list[dict[str, Any]] = [{TEXT: text} for text in self.texts]
        if kind == EMBEDDING:
            queries = [{EMBEDDING: vector.tolist()} for vector in self.vectors]
        return [json.dumps({"query": query, "mode": mode, **more}) for query in queries]

    def plan(self, bodies: Sequence[str], others: Sequence[str] = (), **more: Any) -> Plan:
        """A load's plan: searches, and behind them the first body for other URLs."""
        targets = [(f"{self.url}/search", body) for body in bodies]
        targets += [(url, bodies[0]) for url in others]
        return Plan(targets, timeout_s=_TIMEOUT_S, **more)

    def send(self, name: str, plan: Plan, streams: Sequence[Stream]) -> Outcome:
        """Send a load whose files and random numbers go by a name."""
        return send(self.settings.out / "load", plan, streams, self.settings.rng(name))


def prepared(settings: Settings, more: Sequence[str] = ()) -> Recipe:
    """The resolved recipe, with adapter, embeddings and index there; made where they are missing.

    Args:
        settings: What was asked for.
        more: Overrides of a part; the command line's go before them.

    Raises:
        ConfigError: The recipe is wrong.
    """
    folders = []
    if settings.recipe == RECIPE:
        places = {"data.dir": settings.out / "data", "storage.dir": settings.out / "run"}
        folders = [f"{key}={path}" for key, path in places.items()]
    recipe = load_recipe(settings.recipe, [*folders, *more, *settings.overrides])
    if not any(one.startswith("serve.port=") for one in settings.overrides):
        port = {"serve": recipe.serve.model_copy(update={"port": free_port()})}
        recipe = recipe.model_copy(update=port)
    generate_files(recipe.data)
    if not recipe.storage.adapter.is_dir():
        recipe.storage.dir.mkdir(parents=True, exist_ok=True)
        backbone = backbone_of(recipe)
        save_adapter(recipe.storage.adapter, backbone, untrained_latents(recipe, backbone))
    if recipe.index.engine != FAISS or not recipe.storage.index.is_dir():
        show(f"preparing an index in {recipe.storage.dir}")
        with connect(recipe.resources):
            embed(recipe)
            index(recipe)
    return recipe


@contextmanager
def running(settings: Settings, more: Sequence[str] = ()) -> Iterator[Stand]:
    """The service of a recipe with a Ray of its own, while the block runs; as `prepared` otherwise.

    Raises:
        SlqError: The service does not start.
    """
    recipe = prepared(settings, more)
    texts = query_texts(recipe)
    vectors = encoder_of(recipe).encode(texts)
    with connect(recipe.resources):
        try:
            yield Stand(start(recipe), recipe, settings, texts, vectors)
        finally:
            stop()


def query_texts(recipe: Recipe) -> list[str]:
    """The first texts of the recipe's queries."""
    texts = pq.read_table(recipe.data.path("queries"), columns=["text"])["text"].to_pylist()
    return [text for text in texts if text][:_NUM_QUERIES]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OneClient:
    """A client that waits for each answer before it asks again, over one connection.

    Args:
        url: Of the server.
    """

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(
            url.removeprefix("http://").rstrip("/"), timeout=_TIMEOUT_S
        )

    def ask(self, path: str, body: str) -> tuple[float, int, bytes]:
        """Seconds until all of the answer was there, its status and its body."""
        began = time.perf_counter()
        self._connection.request("POST", path, body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        return time.perf_counter() - began, answer.status, content

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    return {
        **hardware(torch.device("cpu")),
        "cpu": cpu_name(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": [round(value, 2) for value in psutil.getloadavg()],
        "python": platform.python_version(),
        "ray": ray.__version__,
    }


def with_defaults(settings: Settings, *, seconds: float, repeats: int = 1) -> Settings:
    """Settings with a part's own length and rounds where none were asked for."""
    return replace(
        settings, seconds=settings.seconds or seconds, repeats=settings.repeats or repeats
    )
