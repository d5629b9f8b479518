"""An evaluation as Markdown: all metrics of all systems by subset and direction, and what they were measured with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.report.tables import p_text, signed
from jobs.results import SYSTEM_NAMES
from slq.benchmarks.contract import EVERY_KIND
from slq.benchmarks.published import Published, published
from slq.errors import StorageError

FILE = "results.md"
DIRECTIONS = {"text_to_image": "text -> image", "image_to_text": "image -> text"}


PublishedOf = Callable[[str, str, str], Sequence[Published]]
"""Given the name of a benchmark, a direction such as `text -> image`, and the name of a metric."""


def write_markdown(
    folder: Path, results: Mapping[str, Any], published_of: PublishedOf = published
) -> Path:
    """Write `results.md`; gives its path.

    Args:
        folder: Of the evaluation.
        results: As `pipelines.evaluate.evaluate` gives them.
        published_of: Finds numbers to stand beside ours.

    Raises:
        StorageError: It cannot be written.
    """
    path = folder / FILE
    partial = folder / f".{FILE}.partial"
    try:
        partial.write_text("\n".join(lines(results, published_of)) + "\n")
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error}; free space or choose another folder"
        ) from None
    return path


def lines(results: Mapping[str, Any], published_of: PublishedOf = published) -> Iterator[str]:
    """The lines of `results.md`; arguments as of `write_markdown`."""
    yield "# Evaluation"
    yield ""
    yield (
        f"{results['num_queries']:,} queries on {results['num_items']:,} items"
        f"{_unreadable(results)}. Figures are means over queries in %, with 95% bootstrap intervals over queries; "
        "equal scores count against a system. hit@k: a right item is among the first k (papers on COCO call it R@k); "
        "recall@k: the share of the right items that are."
    )
    yield from _cut(results.get("cut_at", {}))
    for direction, title in _directions(results).items():
        reports = {
            name: of[direction] for name, of in results["systems"].items() if direction in of
        }
        for subset, entry in next(iter(reports.values()), {}).items():
            yield from ("", f"## {title}, {subset} (n = {entry['num_queries']:,})", "")
            names = metric_names(entry)
            rows = {system: report[subset] for system, report in reports.items()}
            yield from _table(["system", *names], _figures(rows, names))
            yield from _published(results, title, names, published_of)
            tests = results.get("paired", {}).get(direction, {}).get(subset, {})
            yield from _tests(tests, names)
    yield from _groups(results, published_of)
    yield from ("", "## How it was measured", "")
    yield from _table(["", ""], measured_with(results))


def _directions(results: Mapping[str, Any]) -> dict[str, str]:
    """The directions by key, as they are called; the first one as the benchmark calls it."""
    facts = results.get("benchmark") or {}
    return {**DIRECTIONS, "text_to_image": facts.get("direction", DIRECTIONS["text_to_image"])}


def metric_names(entry: Mapping[str, Any]) -> list[str]:
    """Metrics of a report of a subset, by kind and then by depth."""

    def key(name: str) -> tuple[str, int]:
        kind, _, depth = name.partition("@")
        return kind, int(depth or 0)

    return sorted((name for name in entry if f"{name}_interval" in entry), key=key)


def _unreadable(results: Mapping[str, Any]) -> str:
    number = results.get("num_unreadable", 0)
    return f" ({number:,} items or queries could not be read, and are left out)" if number else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(['---', *('---:' for _ in head[1:])])}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _figures(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """A row of each system; the best of each metric is bold."""
    best = {name: max(entry[name] for entry in rows.values()) for name in names}
    table = []
    for system, entry in rows.items():
        cells = []
        for name in names:
            value, (low, high) = entry[name], entry[f"{name}_interval"]
            shown = f"{100 * value:.1f}"
            bold = f"**{shown}**" if value == best[name] else shown
            cells.append(f"{bold} ({100 * low:.1f}-{100 * high:.1f})")
        table.append([SYSTEM_NAMES.get(system, system), *cells])
    return table


def _cut(cut_at: Mapping[str, int]) -> Iterator[str]:
    """What is to be said of systems that rank a few items only."""
    for system, depth in cut_at.items():
        name = SYSTEM_NAMES.get(system, system)
        yield ""
        yield (
            f"{name} gives {depth:,} items of each query: its mrr, map and ndcg without a depth count no other, so "
            "they are not those of a system that ranks all items, and no test compares them."
        )


def _groups(results: Mapping[str, Any], published_of: PublishedOf) -> Iterator[str]:
    """Means over kinds, a column of each headline metric and group, as benchmarks of many kinds are reported."""
    facts = results.get("benchmark") or {}
    metrics = facts.get("headline", {}).get(EVERY_KIND, ())
    means = {name: of["groups"] for name, of in results["systems"].items() if of.get("groups")}
    if not means or not metrics:
        return
    columns = [(metric, group) for group in next(iter(means.values())) for metric in metrics]
    best = [max(of[group][metric] for of in means.values()) for metric, group in columns]
    rows = []
    for system, of in means.items():
        values = [of[group][metric] for metric, group in columns]
        shown = [
            f"**{100 * value:.1f}**" if value == top else f"{100 * value:.1f}"
            for value, top in zip(values, best, strict=True)
        ]
        rows.append([SYSTEM_NAMES.get(system, system), *shown])
    whole = {
        f"{metric} {group}"
        for metric, group in columns
        if group in facts.get("published_groups", ())
    }

    def of_whole(benchmark: str, direction: str, metric: str) -> Sequence[Published]:
        return published_of(benchmark, direction, metric) if metric in whole else ()

    names, direction = [f"{metric} {group}" for metric, group in columns], facts["direction"]
    yield from ("", f"## {direction}, means over kinds", "")
    yield from ("Each kind counts once, whatever the number of its queries.", "")
    yield from _table(["system", *names], rows)
    yield from _published(results, direction, names, of_whole)


def _published(
    results: Mapping[str, Any],
    direction: str,
    names: Sequence[str],
    published_of: PublishedOf,
) -> Iterator[str]:
    """A table of others' numbers, one row for each method and source."""
    facts = results.get("benchmark") or {}
    if not facts.get("is_published"):
        return  # of users' own data, or of another part than that of the papers
    benchmark = facts["name"]
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for name in names:
        for one in published_of(benchmark, direction, name):
            rows.setdefault((one.model, one.source), {})[name] = one.value
    if not rows:
        return
    yield from ("", f"Published on {benchmark}:", "")
    yield from _table(
        ["model", *names, "source"],
        [
            [model, *(f"{found[n]:.1f}" if n in found else "" for n in names), source]
            for (model, source), found in rows.items()
        ],
    )


def _tests(tests: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> Iterator[str]:
    """Paired tests of the first hit@k; those of all metrics are in the JSON."""
    metric = next((name for name in names if name.startswith("hit@")), None)
    if metric is None or not tests.get(metric):
        return
    yield from (
        "",
        f"Paired permutation tests of {metric} (Holm: corrected over the pairs of this table):",
        "",
    )
    rows = []
    for test in tests[metric]:
        first, second = (SYSTEM_NAMES.get(name, name) for name in test["systems"])
        low, high = test["interval"]
        points = [signed(100 * value, 1) for value in (test["difference"], low, high)]
        rows.append(
            [
                f"{first} - {second}",
                f"{points[0]} ({points[1]} to {points[2]})",
                p_text(test["p"]),
                p_text(test["p_holm"]),
            ]
        )
    yield from _table(["systems", "points", "p", "Holm"], rows)


def measured_with(results: Mapping[str, Any]) -> list[list[str]]:
    """Label and value of all that the figures depend on."""
    told, backbone = results.get("provenance", {}), results.get("backbone", {})
    machine, data = told.get("hardware", {}), told.get("data", {})
    cluster = machine.get("cluster")
    rows = {
        "command": f"`{told['command']}`" if told.get("command") else "",
        "date": told.get("date", ""),
        "backbone": f"{backbone.get('model', '')} {backbone.get('revision') or ''}".strip(),
        "adapter fingerprint": results.get("fingerprint", ""),
        "data": ", ".join(f"{name} {value}" for name, value in data.items()),
        "hardware": ", ".join(
            [
                f"{machine.get('cpu', '')}, {machine.get('cores', '')} cores, {machine.get('memory_gib', '')} GiB",
                *(machine.get("gpus") or ["no GPU"]),
            ]
        )
        if machine
        else "",
        "cluster": f"{cluster['nodes']} nodes, {cluster['cpus']:g} CPUs, {cluster['gpus']:g} GPUs "
        f"{', '.join(cluster['accelerators'])}".strip()
        if cluster
        else "",
        "versions": ", ".join(
            f"{name} {value}" for name, value in told.get("versions", {}).items()
        ),
        "git revision": told.get("git_revision") or "",
        **{f"setting: {name}": _setting(of) for name, of in told.get("setting", {}).items()},
    }
    return [[name, value] for name, value in rows.items() if value]


def _setting(section: Mapping[str, Any]) -> str:
    """What a section of the recipe holds, without what is empty."""
    return ", ".join(
        f"{name} {value}" for name, value in section.items() if value not in (None, [], {}, "")
    )
