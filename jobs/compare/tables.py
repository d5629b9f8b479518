"""The table of a study: one row per measured system, for the terminal and as Markdown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jobs.compare.pairs import corrected, paired_p
from jobs.compare.papers import published_columns
from jobs.compare.study import ZERO_SHOT, Plan
from pipelines.recipe import LENGTH_MARK, VARIANT_MARK

_METRIC = "hit@1"
_ZERO_SHOT_NAMES = {"last_token": "zero-shot last token", "untrained": "untrained latents"}
LEGEND = (
    "hit@1 in %, text to image, with 95% bootstrap intervals over queries.",
    "training s: reading, frozen passes and updates of all steps; peak GiB: of one worker's process (on a GPU, of its "
    "tensors).",
)
KEPT = (
    "match, caption kept: match prompts answered rightly and scenes said exactly, in %, with the adapter loaded; "
    "weights: whether the model's own are bit for bit those from before."
)
_TESTED = (
    "p: two-sided, of a paired randomisation test on hit@1 against {baseline}, query by query; in brackets, corrected "
    "for the number of rows (Holm)."
)
_ASKED = (
    "kept of a set of questions: right answers in %, with 95% bootstrap intervals over questions."
)
_SKILLS = {"match_accuracy": "match", "caption_accuracy": "caption"}
Row = dict[str, Any]


def study_summary(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `study.json` holds: rows of the table, notes, and the results they are made from."""
    rows = study_rows(results, paired_p(plan, results))
    return {
        "study": plan.source.name,
        "recipe": str(plan.study.recipe),
        "metric": "text_to_image/hit@1",
        "baseline": plan.baseline,
        "rows": rows,
        "notes": notes(results),
        "results": dict(results),
    }


def study_rows(
    results: Mapping[str, Mapping[str, Any]],
    paired: Mapping[tuple[str, str], Mapping[str, float]] | None = None,
) -> list[Row]:
    """One row per zero-shot system, then one per trained system of every run.

    Args:
        results: As `jobs.compare.running.run_study` gives them.
        paired: As `jobs.compare.pairs.paired_p` gives them.
    """
    rows = []
    for run, result in results.items():
        systems = result["results"]["systems"]
        if run == ZERO_SHOT:
            names = {key: name for key, name in _ZERO_SHOT_NAMES.items() if key in systems}
        else:
            trained = sorted((key for key in systems if key.startswith("slq")), key=_order)
            is_whole_run = "adapter_of" in result and len(trained) == 1
            names = {key: run if is_whole_run else _row_name(run, key) for key in trained}
        rows += [_row(name, run, key, result) for key, name in names.items()]
    raised = corrected(paired or {})
    for row in rows:
        key = row["run"], row["system"]
        row["p"], row["p_holm"] = dict((paired or {}).get(key, {})), raised.get(key, {})
    return rows


def _order(system: str) -> list[tuple[bool, int, str]]:
    """The run's own adapter first, and 4 latents before 16."""
    parts = re.split(r"(\d+)", system)
    return [(part != "slq", int(part) if part.isdigit() else 0, part) for part in parts]


def _row_name(run: str, system: str) -> str:
    if system == "slq":
        return run
    if system == "slq_fine":
        return f"{run} + fine stage"
    if system.startswith(f"slq{LENGTH_MARK}"):
        return f"{run}, cut to {system.partition(LENGTH_MARK)[2]}"
    return f"{run}: {system.removeprefix(f'slq{VARIANT_MARK}')}"


def _row(name: str, run: str, system: str, result: Mapping[str, Any]) -> Row:
    report = result["results"]["systems"][system]["text_to_image"]
    systems = result["results"]["systems"]
    alone = not any(name.startswith(f"slq{VARIANT_MARK}") for name in systems)
    training = (alone and result.get("training")) or {}  # of all variants together it says nothing
    own = system in (
        "slq",
        *_ZERO_SHOT_NAMES,
    )  # a model's skills are asked with the run's own adapter
    return {
        "name": name,
        "run": run,
        "system": system,
        "trained_parameters": (result.get("trained_parameters") or {}).get(system),
        "training_seconds": training.get("seconds"),
        "gpu_hours": _gpu_hours(training.get("seconds"), result),
        "peak_memory_bytes": training.get("peak_memory_bytes"),
        "hits": {
            subset: {
                "value": entry[_METRIC],
                "interval": list(entry[f"{_METRIC}_interval"]),
                "num_queries": entry["num_queries"],
            }
            for subset, entry in report.items()
        },
        "categories": {
            category: {"value": entry[_METRIC], "interval": list(entry[f"{_METRIC}_interval"])}
            | {"num_queries": entry["num_queries"]}
            for category, entry in systems[system].get("categories", {}).items()
        },
        "retention": result.get("retention") if own else None,
        "tuned": result.get("tuned"),
    }


def notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the table needs to be read rightly: chosen values, and those on the edge of their grid."""
    found = []
    for run, result in results.items():
        tuned = result.get("tuned")
        if tuned is None:
            continue
        grid = ", ".join(str(trial["value"]) for trial in tuned["trials"])
        text = f"{run}: {tuned['key']} {tuned['value']}, chosen from {grid}"
        if tuned["on_edge"]:
            text += "; it is on the edge of its grid, so widen that before comparing"
        failed = [str(trial["value"]) for trial in tuned["trials"] if trial.get("error")]
        if failed:
            text += f"; trials that failed: {', '.join(failed)}"
        found.append(text)
    return found


def main_subsets(rows: Sequence[Row]) -> list[str]:
    """Subsets of the first row that are no part of another one, as `explicit` and `knowledge`."""
    return [name for name in rows[0]["hits"] if ", " not in name]


def columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The table as text, column by column; a column without any figure is left out."""
    table = {"run": [row["name"] for row in rows]}
    table["trained"] = [_count(row["trained_parameters"]) for row in rows]
    for subset in rows[0]["hits"]:
        size = rows[0]["hits"][subset]["num_queries"]
        table[f"{subset} (n = {size})"] = [_hit(row["hits"].get(subset)) for row in rows]
    for subset in main_subsets(rows):
        table[f"p, {subset}"] = [_p(row, subset) for row in rows]
    table["GPU hours"] = [_number(row.get("gpu_hours"), 1, "{:.2f}") for row in rows]
    table["training s"] = [_number(row["training_seconds"], 1, "{:.0f}") for row in rows]
    table["peak GiB"] = [_number(row["peak_memory_bytes"], 2**-30, "{:.2f}") for row in rows]
    for skill, name in _SKILLS.items():
        kept = [(row["retention"] or {}).get(skill) for row in rows]
        table[f"{name} kept"] = [_number(value, 100, "{:.1f}") for value in kept]
    for title in dict.fromkeys(title for row in rows for title in _sets(row)):
        table[f"{title} kept"] = [_hit(_sets(row).get(title)) for row in rows]
    table["weights"] = [_weights(row["retention"]) for row in rows]
    return {name: cells for name, cells in table.items() if any(cells)}


def _gpu_hours(seconds: float | None, result: Mapping[str, Any]) -> float | None:
    """Of all workers of a training together; None of one without GPUs."""
    resources = result.get("recipe", {}).get("resources", {})
    gpus = resources.get("train_workers", 0) * resources.get("gpus_per_worker", 0)
    return seconds * gpus / 3600 if seconds is not None and gpus else None


def is_quality(column: str) -> bool:
    """Whether a column of the table tells how well a system finds, and not what it costs."""
    return "(n = " in column or column.startswith("p, ")


def category_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The table of knowledge by category; empty where queries have none."""
    first: Mapping[str, Any] = next(
        (row["categories"] for row in rows if row.get("categories")), {}
    )
    if not first:
        return {}
    table = {"run": [row["name"] for row in rows]}
    for category, entry in first.items():
        name = f"{category.replace('_', ' ')} (n = {entry['num_queries']})"
        table[name] = [_hit(row["categories"].get(category)) for row in rows]
    return table


def _p(row: Row, subset: str) -> str:
    if subset not in row.get("p", {}):
        return ""
    alone, among = (
        "<.001" if one < 0.001 else f"{one:.3f}".lstrip("0")
        for one in (row["p"][subset], row["p_holm"][subset])
    )
    return f"{alone} ({among})"


def _sets(row: Row) -> dict[str, Mapping[str, Any]]:
    """What was measured of sets of questions, by title, in the form of a hit."""
    sets = ((row["retention"] or {}).get("sets") or {}).values()
    return {one["title"]: {"value": one["accuracy"], **one} for one in sets}


def _hit(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else form.format(scale * value)


def _weights(retention: Mapping[str, Any] | None) -> str:
    if retention is None:
        return ""
    return "identical" if retention["weights_identical"] else "changed"


def study_table(summary: Mapping[str, Any]) -> Group:
    """The table for a terminal, in two parts: hits, and what they cost."""
    found = columns(summary["rows"])
    parts = {"text -> image, hit@1 in % (95% interval)": True, "cost and retention": False}
    told = [_part(title, found, hits) for title, hits in parts.items()]
    by_category = category_columns(summary["rows"])
    if by_category:
        told.insert(1, _part("by category of knowledge, hit@1 in %", by_category, hits=True))
    return Group(*told)


def _part(title: str, found: Mapping[str, list[str]], hits: bool) -> Table:
    wanted = {name: cells for name, cells in found.items() if is_quality(name) == hits}
    wanted = {"run": found["run"], **wanted}
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in wanted:
        side: Any = "left" if name in ("run", "weights") else "right"
        table.add_column(name, justify=side, overflow="fold", min_width=9 if hits else None)
    for first, *cells in zip(*wanted.values(), strict=True):
        # an interval below its value, so that six subsets fit into 80 columns
        folded = [cell.replace(" (", "\n").removesuffix(")") for cell in cells]
        table.add_row(escape(first), *(folded if hits else cells))
    return table


def study_markdown(summary: Mapping[str, Any]) -> str:
    """The table and its notes, to paste into a README."""
    found = columns(summary["rows"])
    asked = [_ASKED] if any(_sets(row) for row in summary["rows"]) else []
    told = [*LEGEND, *([KEPT] if "weights" in found else []), *asked, *summary["notes"]]
    if any(name.startswith("p, ") for name in found):
        told.append(_TESTED.format(baseline=summary["baseline"]))
    by_category = category_columns(summary["rows"])
    lines = _lines(found)
    papers = published_columns(summary.get("results", {}))
    if papers:
        lines += ["", *_lines(papers)]
    if by_category:
        lines += ["", "By category of knowledge, of objects that the model has seen:", ""]
        lines += _lines(by_category)
    return "\n".join([*lines, "", *(f"- {_cell(note)}" for note in told), ""])


def _lines(found: Mapping[str, list[str]]) -> list[str]:
    """A table in Markdown."""
    left = ("run", "weights", "published", "source")
    rules = ["---" if name in left else "---:" for name in found]
    rows = [list(found), rules, *(list(cells) for cells in zip(*found.values(), strict=True))]
    return ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
