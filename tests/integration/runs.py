"""Pieces that the tests of the flows share: changed recipes, an adapter without training, views of folders."""

import hashlib
import io
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embed import embed
from pipelines.index import index
from pipelines.ledger_reader import LedgerReader
from pipelines.loading import backbone_of, untrained_latents
from pipelines.recipe import Recipe
from slq.artifacts import save_adapter
from slq.index.parts import matrix
from slq.index.vectors import unit


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with keys of some sections replaced and validated."""
    values = recipe.model_dump()
    for name, keys in sections.items():
        values[name] = {**values[name], **keys}
    return Recipe.model_validate(values)


def with_untrained_adapter(recipe: Recipe, *, seed: int = 0) -> Recipe:
    """Save latent queries as they are before training, so that a flow behind training can run."""
    recipe = changed(recipe, adapter={"seed": seed})
    backbone = backbone_of(recipe)
    recipe.storage.dir.mkdir(parents=True, exist_ok=True)
    save_adapter(recipe.storage.adapter, backbone, untrained_latents(recipe, backbone))
    return recipe


def indexed_scenes(scenes_dir: Path, run: Path, *, depth: int = 10, **serve: Any) -> Recipe:
    """The recipe of a small service whose untrained adapter has embedded the scenes, indexed.

    Args:
        scenes_dir: Of the generated scenes.
        run: The run folder.
        depth: Of the fine stage.
        serve: Further settings of the service.
    """
    recipe = with_untrained_adapter(
        changed(
            Recipe(),
            data={"dir": scenes_dir},
            adapter={"num_latents": 4},
            embed={"shard_rows": 40},
            rerank={"depth": depth},
            serve={"port": free_port(), "num_threads": 1, **serve},
            storage={"dir": run},
        )
    )
    embed(recipe)
    index(recipe)
    return recipe


def fingerprints_of_files(root: Path) -> dict[str, tuple[int, str]]:
    """(modification time in ns, sha256) of every file below `root`."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def read_embeddings(location: str) -> tuple[pa.Table, NDArray[np.float32], str]:
    """Rows (without vectors), (n, dimension) float32 unit vectors and fingerprint of a finished data set."""
    reader = LedgerReader(location)
    shards = [pq.read_table(io.BytesIO(reader.store.read(n))) for n in reader.verified_shards()]
    table, manifest = pa.concat_tables(shards), reader.manifest()
    assert manifest is not None
    return (
        table.drop_columns("embedding"),
        unit(matrix(table["embedding"])),
        manifest["fingerprint"],
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def enlarge(folder: Path, size: str = "64m") -> None:
    """Give a `small_disk` 64 MiB, or as much as `mount` is told."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def write_run(recipe: Recipe, path: Path, *, per_query: int = 6, seed: int = 1) -> Recipe:
    """A run of random candidates with the relevant one among them, for a third of the queries."""
    rng = random.Random(seed)
    queries = pq.read_table(recipe.data.path("queries"))["id"].to_pylist()[::3]
    items = pq.read_table(recipe.data.path("corpus"))["id"].to_pylist()
    answers = {
        row["query_id"]: row["item_id"]
        for row in pq.read_table(recipe.data.path("relevance")).to_pylist()
    }
    rows = []
    for query in queries:
        others = rng.sample([item for item in items if item != answers[query]], per_query - 1)
        for item in rng.sample([answers[query], *others], per_query):
            rows.append({"query_id": query, "item_id": item, "score": rng.random()})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return changed(recipe, rerank={"run": path})


def broken_corpus(recipe: Recipe, path: Path, numbers: list[int]) -> Recipe:
    """The recipe with a corpus in which some images are none."""
    rows = pq.read_table(recipe.data.path("corpus")).to_pylist()
    for number in numbers:
        rows[number]["image"] = b"\x89PNG no image"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return changed(recipe, data={"corpus": str(path)})


def actor_processes(name: str) -> list[psutil.Process]:
    """Live actors of this test session's own Ray: descendants of this process only."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def killing_after_a_commit(data_set: Path, actor: str) -> Iterator[None]:
    """Kill one of the actors of a run, with SIGKILL, once its first shard is committed; fails if the run is faster."""
    commits, done = data_set / "commits", threading.Event()
    killed = threading.Event()

    def kill() -> None:
        while not done.is_set() and not killed.is_set():
            if commits.is_dir() and list(commits.glob("0*.json")):
                victims = actor_processes(actor)
                if victims:
                    os.kill(victims[0].pid, signal.SIGKILL)
                    killed.set()
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        yield
        assert killed.is_set(), f"the run ended before its {actor} could be killed"
    finally:
        done.set()
        killer.join()
