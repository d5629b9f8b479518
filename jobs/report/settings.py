"""What a run's numbers depend on, and the command that repeats it."""

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from pipelines.recipe import Recipe, RerankConfig, load_recipe
from slq.artifacts import ADAPTER_CONFIG
from slq.engines import FAISS
from slq.files import read_json
from slq.reranking.framings import FRAMINGS

JOBS = Path(__file__).parents[1]
_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "faiss-cpu", "faiss-gpu")


def settings(recipe: Recipe, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers depend on, as label and value."""
    train, rerank, data = recipe.train, recipe.rerank, recipe.data
    pairs = data.path("train")
    count = f"{pq.ParquetFile(pairs).metadata.num_rows:,} pairs, " if pairs.is_file() else ""
    device = f"{recipe.backbone.device}, {recipe.backbone.dtype}"
    rows = [
        ("backbone (frozen)", f"{recipe.backbone.name} on {device}"),
        ("revision", str(results["backbone"].get("revision") or "")),
        ("latent queries", _latents(recipe)),
        (
            "training",
            f"{count}{train.num_steps:,} steps of {train.global_batch:,} pairs on "
            f"{recipe.resources.train_workers} workers, peak learning rate {train.lr:g}, "
            f"seed {train.seed}",
        ),
        ("gallery", f"{results['num_items']:,} items, {results['num_queries']:,} queries"),
        ("index", recipe.index.kind if recipe.index.engine == FAISS else recipe.index.engine),
    ]
    if "slq_fine" in results["systems"]:
        rows.append(("fine stage", fine_stage(rerank)))
    rows += [
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        ("versions", ", ".join(versions())),
        ("fingerprint", _adapter(recipe).get("fingerprint", "")),
    ]
    return [(name, value) for name, value in rows if value]


def fine_stage(rerank: RerankConfig) -> str:
    """The fine stage in words: all that its scores and places depend on."""
    framing = rerank.question
    name = framing.replace("_", "/") if framing in FRAMINGS else framing
    most = "up to " if rerank.adaptive else ""
    parts = [f"{name} question on {most}the first {rerank.depth} candidates"]
    if rerank.instruction:
        parts.append(f"instruction {rerank.instruction!r}")
    if rerank.context_free:
        parts.append(f"less the margin of an empty {rerank.context_free}")
    if rerank.enhancement.is_on:
        again = rerank.enhancement
        parts.append(f"{again.mode} visual enhancement of {again.alpha:g}")
    if rerank.backbone is not None:
        parts.append(f"by {rerank.backbone.name}")
    if rerank.fuse:
        parts.append("fused with coarse scores")
    if rerank.profile != "default":
        parts.append(f"in the order of {rerank.profile}")
    return ", ".join(parts)


def _adapter(recipe: Recipe) -> dict[str, Any]:
    path = recipe.storage.adapter / ADAPTER_CONFIG
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    return config


def _latents(recipe: Recipe) -> str:
    number, hidden = recipe.adapter.num_latents, _adapter(recipe).get("hidden_size")
    if hidden is None:
        return str(number)
    shape = f"{number} \N{MULTIPLICATION SIGN} {hidden}"
    return f"{shape}, with the temperature {number * hidden + 1:,} trained numbers"


def versions() -> Iterator[str]:
    """Python and the installed packages that compute the numbers."""
    yield f"Python {platform.python_version()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def reproduce_command(recipe: Recipe) -> str:
    """The `slq demo` command of this run; it names every setting that differs from the demo's."""
    out_dir = recipe.storage.dir
    demo = load_recipe(JOBS / "recipes" / "demo.yaml")
    usual = dict(_leaves(demo.model_dump(mode="json")))
    usual |= {"storage.dir": str(out_dir), "data.dir": str(out_dir / "data")}
    parts = ["slq", "demo", "--out", str(out_dir)]
    for key, value in _leaves(recipe.model_dump(mode="json")):
        if key not in usual or usual[key] != value:
            parts += ["--set", f"{key}={_yaml_value(value)}"]
    return shlex.join(parts)


def _leaves(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{parent}{name}.")
        else:
            yield f"{parent}{name}", value


def _yaml_value(value: Any) -> str:
    plain = isinstance(value, str) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value)
