"""Rows per second of the whole flow against those of forward passes alone, and of two workers against one."""

import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from jobs.bench.embedding.inputs import recipe_for, write_images, write_texts
from pipelines.corpus import corpus_of, write_plan
from pipelines.embed import REPORT, embed
from pipelines.embedding.batches import unpack_prompts
from pipelines.embedding.flow import PLAN
from pipelines.embedding.models import adapter_configs, new_flow
from pipelines.embedding.prepare import prepared_pieces
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from pipelines.runtime import connect
from slq.errors import HardwareError

KINDS = ("images", "texts")
_GUESS_ROWS_PER_S = {"images": 70, "texts": 280}  # of one core, to choose how many rows a run needs
_SAMPLE_ROWS = 512
_PIECE_ROWS = {"images": 256, "texts": 4096}
_SMALL_PIECE_ROWS = {"images": 64, "texts": 256}
"""About a second of an encoder's work: of two encoders one may have a piece more than the other at the end."""


def measure_throughput(
    folder: Path, kinds: Sequence[str], *, seconds: float, repeats: int
) -> dict[str, Any]:
    """For each kind: `pipeline_to_raw`, the median over rounds of flow, pass alone, flow, ...

    The raw side has its batches ready and padded in memory, the same ones that the flow forms, on one thread as the
    flow's encoder. The flow is timed from its first written piece to its last.
    """
    return {kind: _throughput(folder, kind, seconds, repeats) for kind in kinds}


def _throughput(folder: Path, kind: str, seconds: float, repeats: int) -> dict[str, Any]:
    recipe = _recipe(folder, kind, seconds, piece_rows=_PIECE_ROWS[kind])
    ratios, flows, alone, reports = [], [], [], []
    before = _raw_rows_per_s(recipe, 1, seconds / 4)
    for _ in range(repeats):
        report = _run(recipe)
        after = _raw_rows_per_s(recipe, 1, seconds / 4)
        raw = (before + after) / 2
        ratios.append(report["rows_per_s"] / raw)
        flows.append(report["rows_per_s"])
        alone.append(raw)
        reports.append(report)
        before = after
    last = reports[-1]
    return {
        "pipeline_to_raw": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "pipeline_rows_per_s": round(statistics.median(flows), 1),
        "raw_rows_per_s": round(statistics.median(alone), 1),
        "rows": last["rows"],
        "padding_share": last["padding_share"],
        "encoder_busy_share": statistics.median(report["busy_share"] for report in reports),
    }


def measure_scaling(
    folder: Path, kinds: Sequence[str], *, seconds: float, repeats: int
) -> dict[str, Any]:
    """For each kind, medians over rounds: rows per second of two workers over those of one.

    - `grown`: the machine grows with the workers, as a cluster does: one worker and all that feeds it on one
      processor, against two on two.
    - `fixed`: both have two processors. The second encoder takes processor time from preparation, so `limit` is what
      encoders could reach here if nothing but passes and preparation cost anything: from the processor seconds of an
      item's pass and of its preparation.
    - `raw`: bare processes that do nothing but passes over batches in memory.
    """
    return {kind: _scaling(folder, kind, seconds, repeats) for kind in kinds}


def _scaling(folder: Path, kind: str, seconds: float, repeats: int) -> dict[str, Any]:
    one, two = (
        _recipe(folder, kind, seconds / 2, workers=n, piece_rows=_SMALL_PIECE_ROWS[kind])
        for n in (1, 2)
    )
    found: dict[str, list[float]] = {"grown": [], "fixed": [], "raw": []}
    for _ in range(repeats):
        with _processors(1):
            small = _run(one)["rows_per_s"]
        with _processors(2):
            rates = [_run(recipe)["rows_per_s"] for recipe in (one, two)]
        found["grown"].append(rates[1] / small)
        found["fixed"].append(rates[1] / rates[0])
        raw = [_raw_rows_per_s(one, n, seconds / 4) for n in (1, 2)]
        found["raw"].append(raw[1] / raw[0])
    return {
        **{name: round(statistics.median(values), 3) for name, values in found.items()},
        "limit": round(_limit(one), 3),
        "rounds": {name: [round(value, 3) for value in values] for name, values in found.items()},
    }


@contextmanager
def _processors(count: int) -> Iterator[None]:
    """Only so many processors for what is started meanwhile: Ray and all its workers.

    Raises:
        HardwareError: There are fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < count:
        raise HardwareError(f"{count} processors are needed, {len(allowed)} may be used")
    os.sched_setaffinity(0, allowed[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _limit(recipe: Recipe) -> float:
    """Two encoders over one, where they share the processors with preparation and one has them to itself."""
    flow = new_flow(recipe, adapter_configs(recipe))
    (encoder,) = flow.encoders()
    pieces = [piece for _, piece in zip(range(2), prepared_pieces(flow, 0), strict=False)]
    began = time.process_time()
    pieces = [piece for _, piece in zip(range(2), prepared_pieces(flow, 0), strict=False)]
    rows = sum(piece.rows.num_rows for piece in pieces)
    prepare_s = (time.process_time() - began) / rows
    batches = [
        encoder.backbone.collate(unpack_prompts(data)[0])
        for piece in pieces
        for data in piece.batches
    ]
    encoder.encode_prompts(batches[0])  # the first pass is slower
    began = time.process_time()
    for batch in batches:
        encoder.encode_prompts(batch)
    encode_s = (time.process_time() - began) / rows
    return float(min(2.0, 2 * encode_s / (encode_s + prepare_s)))


def _recipe(
    folder: Path, kind: str, seconds: float, *, workers: int = 1, piece_rows: int
) -> Recipe:
    rows = max(1000, int(_GUESS_ROWS_PER_S[kind] * seconds * 1.2 * workers))
    write = write_images if kind == "images" else write_texts
    return recipe_for(
        folder,
        write(folder, rows),
        f"{kind}-{workers}",
        workers=workers,
        shard_rows=4096,
        piece_rows=piece_rows,
    )


def _run(recipe: Recipe) -> dict[str, Any]:
    """One run of the flow into an empty folder, with a Ray of its own."""
    shutil.rmtree(recipe.storage.embeddings, ignore_errors=True)
    with connect(recipe.resources):
        embed(recipe)
    report: dict[str, Any] = json.loads(Path(recipe.storage.embeddings, REPORT).read_text())
    return report


def _raw_rows_per_s(recipe: Recipe, processes: int, seconds: float) -> float:
    """Rows per second of forward passes over batches in memory, of so many processes at once."""
    context = multiprocessing.get_context("spawn")
    answers: Queue[float] = context.Queue()
    ready = context.Barrier(processes)
    started = [
        context.Process(target=_raw, args=(recipe, seconds, ready, answers))
        for _ in range(processes)
    ]
    for process in started:
        process.start()
    rates = [answers.get(timeout=600) for _ in started]
    for process in started:
        process.join()
    return sum(rates)


def _raw(recipe: Recipe, seconds: float, ready: Any, answers: "Queue[float]") -> None:
    from pipelines.loading import use_processors

    use_processors(recipe.embed.num_threads)
    flow = new_flow(recipe, adapter_configs(recipe))
    (encoder,) = flow.encoders()
    with Ledger(recipe.storage.embeddings) as ledger:
        if not ledger.store.exists(PLAN):
            place = Path(recipe.storage.embeddings, PLAN)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_plan(corpus_of(recipe).shards(recipe.embed.shard_rows), place)
    packed = []
    for piece in prepared_pieces(flow, 0):
        packed += piece.batches
        if sum(len(unpack_prompts(data)[0]) for data in packed) >= _SAMPLE_ROWS:
            break
    batches = [encoder.backbone.collate(unpack_prompts(data)[0]) for data in packed]
    encoder.encode_prompts(batches[0])  # the first pass is slower
    ready.wait()
    rows, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for batch in batches:
            encoder.encode_prompts(batch).cpu()
            rows += len(batch.input_ids)
    answers.put(rows / (time.perf_counter() - began))
