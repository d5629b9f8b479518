"""What answers come to: scores with intervals, tables of the questions, and a page to read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slq.benchmarks.answering import Answer
from slq.benchmarks.tables import write_rows
from slq.metrics import bootstrap_interval, paired_permutation

ANSWERS = pa.schema(
    [
        ("id", pa.string()),
        ("question_type", pa.string()),
        ("group", pa.string()),
        ("given", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("score", pa.float32()),
        ("images_left_out", pa.int32()),
    ]
)
"""One row per question: what was answered, the right answers, and 1 or 0."""
PLAIN, ADAPTED = "plain", "adapted"
"""The backbone alone, and with the adapter loaded: in results, and as folders."""


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write the table of a set; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, ANSWERS, (asdict(one) for one in answers))


def summary(title: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Scores of a set, with 95% bootstrap intervals over questions.

    Args:
        title: Of the set.
        answers: One at least.
    """
    whole = _scored(answers)
    return {
        "title": title,
        **whole,
        "question_types": _by(answers, "question_type"),
        "groups": _by(answers, "group"),
        "images_left_out": sum(one.images_left_out > 0 for one in answers),
        "unanswered": sum(not one.given for one in answers),
    }


def _by(answers: Sequence[Answer], column: str) -> dict[str, Any]:
    names = sorted({getattr(one, column) for one in answers})
    return {
        name: _scored([one for one in answers if getattr(one, column) == name]) for name in names
    }


def _scored(answers: Sequence[Answer]) -> dict[str, Any]:
    scores = np.array([one.score for one in answers], dtype=np.float64)
    return {
        "num_questions": len(answers),
        "right": int(scores.sum()),
        "accuracy": float(scores.mean()),
        "interval": list(bootstrap_interval(scores)),
    }


def compared(plain: Path, adapted: Path) -> dict[str, Any]:
    """Two tables of the same questions: how many answers are the same, and whether scores differ.

    Returns:
        `same_answers`, `num_questions`, `difference` of the accuracies (with the adapter less without), and `p` of a
        paired randomisation test.
    """
    tables = [pq.read_table(path, columns=["given", "score"]) for path in (plain, adapted)]
    given = [table["given"].to_pylist() for table in tables]
    before, after = (table["score"].to_numpy().astype(np.float64) for table in tables)
    same = sum(one == other for one, other in zip(*given, strict=True))
    return {
        "same_answers": same,
        "num_questions": len(before),
        "difference": float(after.mean() - before.mean()),
        "p": paired_permutation(after, before),
    }


def page(result: Mapping[str, Any]) -> str:
    """`retention.md`: the abilities without and with the adapter, and whether the model is still the same."""
    has_adapter = result["adapter"] is not None
    heads = ["ability", "n", "backbone", *(["with the adapter", "same answers"] * has_adapter)]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_row(cells) for cells in ability_rows(result)]
    notes = [_LEGEND, *score_lines(result), *identity_lines(result)]
    notes += [line for report in result[PLAIN]["sets"].values() for line in left_out_lines(report)]
    lines += ["", *(f"- {note}" for note in notes), ""]
    for name, report in result[PLAIN]["sets"].items():
        other = result[ADAPTED]["sets"][name] if has_adapter else None
        lines += _groups(report, other)
    return "\n".join(lines)


_LEGEND = "right answers in %, with 95% bootstrap intervals over questions"


def ability_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Cells of each ability: name, number of questions, without and with the adapter, and equal answers."""
    has_adapter = result["adapter"] is not None
    rows = []
    for name, report in result[PLAIN]["sets"].items():
        cells = [report["title"], f"{report['num_questions']:,}", _cell(report)]
        if has_adapter:
            same = result["compared"][name]["same_answers"]
            cells += [_cell(result[ADAPTED]["sets"][name]), f"{same:,}"]
        rows.append(cells)
    for skill, title in (("match_accuracy", "match prompts"), ("caption_accuracy", "captions")):
        sides = [result[side].get("scenes") for side in (PLAIN, ADAPTED)[: 1 + has_adapter]]
        if sides[0]:
            values = [f"{100 * side[skill]:.1f}" for side in sides]
            rows.append(
                [f"{title} of scenes", f"{result['scenes']:,}", *values, *[""] * has_adapter]
            )
    return rows


def identity_lines(result: Mapping[str, Any]) -> list[str]:
    """What is told of the model with the adapter loaded."""
    found = result["identity"]
    if found is None:
        return []
    weights = "bit-identical" if found["weights_identical"] else "changed"
    logits = (
        "bit-identical"
        if found["logits_identical"]
        else f"changed by up to {found['largest_logit_difference']:.3g}"
    )
    return [f"{found['method']} adapter loaded: weights {weights}, logits {logits}"]


def score_lines(result: Mapping[str, Any]) -> list[str]:
    """Right answers of each set, which for OCRBench is its published score."""
    lines = []
    for name, report in result[PLAIN]["sets"].items():
        line = f"{report['title']}: {report['right']:,} of {report['num_questions']:,} right"
        if result["adapter"] is not None:
            found = result["compared"][name]
            line += (
                f", {result[ADAPTED]['sets'][name]['right']:,} with the adapter (p = {found['p']:.2g}, paired "
                "randomisation)"
            )
        lines.append(line)
    return lines


def left_out_lines(report: Mapping[str, Any]) -> list[str]:
    """What was not asked or answered as it should have been."""
    lines = []
    if report["images_left_out"]:
        lines.append(
            f"{report['title']}: this family shows one image at the start of a turn; {report['images_left_out']:,} "
            "questions were asked with the first of their images only"
        )
    if report["unanswered"]:
        lines.append(f"{report['title']}: {report['unanswered']:,} questions got no answer")
    return lines


def _groups(report: Mapping[str, Any], other: Mapping[str, Any] | None) -> list[str]:
    heads = [
        report["title"],
        "n",
        "right",
        "%",
        *(["right, adapter", "%, adapter"] if other else []),
    ]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for name, group in report["groups"].items():
        cells = [name, str(group["num_questions"]), str(group["right"]), _cell(group)]
        if other is not None:
            cells += [str(other["groups"][name]["right"]), _cell(other["groups"][name])]
        lines.append(_row(cells))
    return [*lines, ""]


def _cell(report: Mapping[str, Any]) -> str:
    low, high = report["interval"]
    return f"{100 * report['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
