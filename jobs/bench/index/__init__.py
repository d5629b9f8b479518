"""Recall and queries per second on text queries: our index against exact flat search and hnswlib, in one run."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.bench.index.build import measure_device, measure_memory, measure_scaling
from jobs.bench.index.curve import write_curve
from jobs.bench.index.data import EmbeddedSet, SearchedSet, ShiftedSet
from jobs.bench.index.sides import Point, flat, hnswlib_points, matrix_of, on_gpu, ours
from jobs.bench.measure import hardware
from pipelines.progress import duration, show
from slq.errors import ConfigError
from slq.index import IndexConfig
from slq.index.codes import threads
from slq.index.config import CPU
from slq.index.devices import device_of
from slq.index.trials import recall_of

PARTS = ("search", "scaling", "memory", "device")
TOP_K = 10
TARGETS = (0.95, 0.98)
_SIDES = {
    "hnswlib": {"hnswlib"},
    "ours": {"pq4 opq", "rabitq random"},
    "gpu": {"gpu flat", "gpu float16", "gpu int8"},
}
_RATIOS = (("ours", "flat"), ("ours", "hnswlib"), ("gpu", "flat"), ("gpu", "ours"))
_QUICK_S = 0.3  # a point's rate, to see which one to measure well
_FP16_BYTES = 2
_CODE_SHARE = 1 / 8  # of float16, at most: codes that take more save too little memory


def run(arguments: list[str]) -> dict[str, Any]:
    """Measure every setting's recall@10 and queries per second; then the fastest of each side, round by round.

    Args:
        arguments: Of the command line, after the benchmark's name.

    Raises:
        ConfigError: Options do not belong together, or hnswlib is not installed.
        HardwareError: A GPU is asked for that is not here.
    """
    parser = argparse.ArgumentParser(prog="slq bench index", description=__doc__)
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="repeatable; all by default, `device` with a GPU only",
    )
    parser.add_argument("--rows", type=int, default=200_000, help="images of the synthetic set")
    parser.add_argument("--dimension", type=int, default=896)
    parser.add_argument(
        "--recipe",
        type=Path,
        help="search what it has embedded, by its text queries (only --part search)",
    )
    parser.add_argument("--queries", type=int, default=1000, help="texts that ask")
    parser.add_argument("--lists", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default=CPU, help="cuda: measure a GPU too")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, all sides in each")
    parser.add_argument("--out", type=Path, help="write index.json and index.png into this folder")
    options = parser.parse_args(arguments)
    parts = _parts(options)
    synthetic = ShiftedSet(options.rows, options.dimension)
    data = synthetic if options.recipe is None else EmbeddedSet.of(options.recipe)
    found: dict[str, Any] = {
        "bench": "index",
        "hardware": hardware(torch.device(options.device if torch.cuda.is_available() else CPU)),
        "rows": data.num_rows,
        "dimension": data.dimension,
    }
    with tempfile.TemporaryDirectory(prefix="slq-bench-") as name:
        folder = Path(name)
        for part in parts:
            if part == "search":
                found |= _search(folder, data, options)
            elif part == "scaling":
                found[part] = measure_scaling(folder, synthetic, options.lists, options.repeats)
            elif part == "device":
                asked = (options.device, options.lists, options.repeats)
                found[part] = measure_device(folder, synthetic, *asked)
            else:
                sizes = [options.rows // 20, options.rows, 5 * options.rows]
                found[part] = measure_memory(folder, sizes, options.dimension, options.lists)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "index.json").write_text(json.dumps(found, indent=2) + "\n")
        if "threads" in found:
            write_curve(found, options.out / "index.png")
    return found


def _parts(options: argparse.Namespace) -> Sequence[str]:
    """What is measured: what was asked for, or all that is possible.

    Raises:
        ConfigError: A part is asked for that needs a GPU, or another set.
        HardwareError: The GPU is not here, or faiss has no code for it.
    """
    asked: list[str] = options.part or []
    device_of(options.device, "--device")
    if options.recipe is not None and set(asked) - {"search"}:
        raise ConfigError(
            "--recipe goes with --part search; the other parts need a set of any size"
        )
    if options.device == CPU and "device" in asked:
        raise ConfigError("--part device compares a GPU with the CPU; add --device cuda")
    if options.recipe is not None:
        return ["search"]
    return asked or [part for part in PARTS if part != "device" or options.device != CPU]


def _search(folder: Path, data: SearchedSet, options: argparse.Namespace) -> dict[str, Any]:
    queries = data.texts(options.queries)
    points = _points(folder, data, options)
    truth = points[0].search(queries, TOP_K)
    return {
        "queries": len(queries),
        "threads": {
            str(count): _measured(points, queries, truth, count, options.repeats)
            for count in options.threads
        },
    }


def _points(folder: Path, data: SearchedSet, options: argparse.Namespace) -> list[Point]:
    shared = {"kind": "ivf", "num_lists": options.lists}
    configs = {
        "pq4 opq": IndexConfig.model_validate({**shared, "codes": "pq4", "rotation": "opq"}),
        "rabitq random": IndexConfig.model_validate(
            {**shared, "codes": "rabitq", "rotation": "random"}
        ),
    }
    if options.device != CPU:
        configs |= on_gpu(options.device, options.lists)
    num_threads = max(options.threads)
    with threads(num_threads):
        found = []
        for name, config in configs.items():
            show(f"building ours ({name}) of {data.num_rows:,} vectors")
            found += ours(folder / name, data, name, config)
        show(f"building hnswlib's graph of {data.num_rows:,} vectors")
        vectors = matrix_of(data)
        return [flat(vectors), *hnswlib_points(vectors, num_threads), *found]


def _measured(
    points: Sequence[Point],
    queries: NDArray[np.float32],
    truth: NDArray[np.int64],
    num_threads: int,
    repeats: int,
) -> dict[str, Any]:
    show(f"{num_threads} threads: trying {len(points)} settings with {len(queries):,} queries")
    began = time.perf_counter()
    with threads(num_threads):
        rows = [_row(point, queries, truth) for point in points]
        show(
            f"  done after {duration(time.perf_counter() - began)}; {repeats} rounds of the fastest"
        )
        at_targets = {
            str(target): _at_target(points, rows, queries, target, repeats) for target in TARGETS
        }
    return {"targets": at_targets, "points": rows}


def _row(point: Point, queries: NDArray[np.float32], truth: NDArray[np.int64]) -> dict[str, Any]:
    found = point.search(queries, TOP_K)
    return {
        "side": point.side,
        "setting": point.setting,
        "recall": round(recall_of(found, truth), 4),
        "qps": round(_rate(point, queries, _QUICK_S), 1),
        "bytes_per_vector": round(point.bytes_per_vector, 1),
    }


def _rate(point: Point, queries: NDArray[np.float32], seconds: float) -> float:
    """Queries per second, all queries in one call, for so long at least."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        point.search(queries, TOP_K)
        done += len(queries)
    return done / (time.perf_counter() - began)


def _at_target(
    points: Sequence[Point],
    rows: Sequence[dict[str, Any]],
    queries: NDArray[np.float32],
    target: float,
    repeats: int,
) -> dict[str, Any]:
    """The fastest point of each side that reaches a recall, measured in turn; ratios are medians over rounds."""
    fp16 = _FP16_BYTES * queries.shape[1]
    chosen = {"flat": 0, **fastest(rows, target, _CODE_SHARE * fp16)}
    rates: dict[str, list[float]] = {side: [] for side in chosen}
    for _ in range(repeats):
        for side, number in chosen.items():
            rates[side].append(_rate(points[number], queries, 1.0))
    result: dict[str, Any] = {
        side: {**rows[number], "qps": round(statistics.median(rates[side]), 1)}
        for side, number in chosen.items()
    }
    for side, other in _RATIOS:
        if side in rates and other in rates:
            ratios = [a / b for a, b in zip(rates[side], rates[other], strict=True)]
            result[f"{side}_to_{other}"] = round(statistics.median(ratios), 2)
    if "ours" in result:
        result["code_share_of_fp16"] = round(result["ours"]["bytes_per_vector"] / fp16, 3)
    return result


def fastest(rows: Sequence[Mapping[str, Any]], target: float, most_bytes: float) -> dict[str, int]:
    """The number of the fastest point of each side but flat that reaches a recall.

    Args:
        rows: Of the points.
        target: Recall to reach.
        most_bytes: That a vector may take in an index of ours on the CPU; larger ones do not count.
    """
    found = {}
    for side, of_side in _SIDES.items():
        good = [
            n
            for n, row in enumerate(rows)
            if row["side"] in of_side
            and row["recall"] >= target
            and (side != "ours" or row["bytes_per_vector"] <= most_bytes)
        ]
        if good:
            found[side] = max(good, key=lambda n: rows[n]["qps"])
    return found
