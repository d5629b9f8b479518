"""A run that dies halfway, and what the same command then repeats."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.bench.embedding.inputs import recipe_for, write_texts
from jobs.bench.embedding.scale import STAND_IN
from pipelines.embed import REPORT
from pipelines.failpoints import VARIABLE
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe

_SHARDS = 20
_CHILD = """
import sys
from pipelines.embed import embed
from pipelines.recipe import Recipe
from pipelines.runtime import connect
recipe = Recipe.model_validate_json(sys.argv[1])
with connect(recipe.resources):
    embed(recipe, models=sys.argv[2])
"""


def measure_resume(folder: Path, size: int) -> dict[str, Any]:
    """Exact counts of what a resumed run encodes and reads, against what was missing, and its time.

    The first driver is killed right after its tenth commit of twenty.
    """
    corpus = write_texts(folder, size)
    recipe = recipe_for(
        folder, corpus, "resume", shard_rows=size // _SHARDS, piece_rows=size // _SHARDS // 4
    )
    shutil.rmtree(recipe.storage.embeddings, ignore_errors=True)
    whole_s = _run(recipe)
    shutil.rmtree(recipe.storage.embeddings)
    killed_s = _run(recipe, **{VARIABLE: f"commit_after:{_SHARDS // 2}"})
    before = Ledger(recipe.storage.embeddings).commits()
    missing = [n for n in range(_SHARDS) if n not in before]
    resumed_s = _run(recipe)
    report = json.loads(Path(recipe.storage.embeddings, REPORT).read_text())
    texts = pq.read_table(corpus, columns=["text"])["text"]
    sizes = pc.binary_length(texts).to_numpy()
    each = size // _SHARDS
    wanted = int(sum(sizes[n * each : (n + 1) * each].sum() for n in missing))
    return {
        "shards_committed_before": len(before),
        "rows_missing": len(missing) * each,
        "rows_encoded_again": report["items"] - len(missing) * each,
        "input_bytes_missing": wanted,
        "input_bytes_read_again": report["input_bytes"] - wanted,
        "seconds": {"whole": whole_s, "killed": killed_s, "resumed": resumed_s},
    }


def _run(recipe: Recipe, **environment: str) -> float:
    """Seconds of one run in a process of its own, with a Ray of its own."""
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD, recipe.model_dump_json(), STAND_IN],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode and not environment:
        raise RuntimeError(f"the run failed:\n{ended.stderr[-3000:]}")
    return round(time.perf_counter() - began, 1)
