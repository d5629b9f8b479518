"""What papers report of the backbone of a study, to stand below its own figures."""

import re
from collections.abc import Mapping
from typing import Any

from jobs.compare.study import ZERO_SHOT
from slq.benchmarks.published import PUBLISHED, Published

_KEPT = ("MMMU", "RealWorldQA", "OCRBench")
_SUFFIXES = re.compile(r"(-(hf|instruct|chat))+$", re.IGNORECASE)


def published_columns(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Numbers of papers on the study's benchmark, by column; empty where none are known.

    Args:
        results: As `jobs.compare.running.run_study` gives them.
    """
    first = results.get(ZERO_SHOT, {}).get("results", {})
    facts = first.get("benchmark") or {}
    backbone = _SUFFIXES.sub("", str(first.get("backbone", {}).get("model", "")).split("/")[-1])
    if not facts or not backbone:
        return {}
    found = [one for one in PUBLISHED if backbone.lower() in one.model.lower()]
    known = (facts["name"], *_KEPT)
    found = [one for one in found if one.benchmark in known]
    if not found:
        return {}
    models = list(dict.fromkeys(one.model for one in found))
    names = list(dict.fromkeys(_column(one) for one in found))
    cells = {(one.model, _column(one)): f"{one.value:g}" for one in found}
    table = {"published": models}
    for name in names:
        table[name] = [cells.get((model, name), "") for model in models]
    table["source"] = [
        ", ".join(dict.fromkeys(one.source for one in found if one.model == model))
        for model in models
    ]
    return table


def _column(one: Published) -> str:
    """`GPU hours`, or benchmark, direction and metric."""
    if one.metric == "gpu_hours":
        return "GPU hours"
    parts = (one.benchmark, one.direction, one.metric)
    return " ".join(part for part in parts if part)
