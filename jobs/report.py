"""The report of a finished run: one HTML file, and a picture for the README."""

import base64
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jobs.results import SYSTEM_NAMES
from pipelines.corpus import Record, plan_shards, read_shard
from pipelines.recipe import Recipe, load_recipe
from slq.artifacts import ADAPTER_CONFIG, read_json
from slq.errors import DataError
from slq.media import decode_image

Outcome = Literal["corrected", "kept", "spoiled", "missed", "found", "lost"]

_HERE = Path(__file__).parent
_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "faiss-cpu", "faiss-gpu")
_SHARD_ROWS = 4096
_SHOWN = 5
_THUMBNAIL_PIXELS = 192

# Okabe and Ito's colours: distinct for the colour-blind, and in grey
_COLOURS = {
    "last_token": "#999999",
    "untrained": "#56B4E9",
    "slq": "#0072B2",
    "slq_fine": "#D55E00",
}
_INK, _MUTED, _LINE, _RIGHT = "#1c2430", "#5b6675", "#dde3ea", "#0b7a45"

_OUTCOMES: dict[Outcome, str] = {
    "corrected": "corrected by the fine stage",
    "kept": "right in both stages",
    "spoiled": "spoiled by the fine stage",
    "missed": "wrong in both stages",
    "found": "right",
    "lost": "wrong",
}
_EXAMPLES: tuple[tuple[str, Outcome], ...] = (
    ("explicit hard", "corrected"),
    ("explicit", "corrected"),
    ("knowledge", "corrected"),
    ("explicit hard", "kept"),
    ("explicit", "kept"),
    ("knowledge", "kept"),
    ("explicit hard", "spoiled"),
    ("knowledge", "missed"),
)
"""What kind of query with which outcome each example of the report shows, where there is one."""
_PICTURED: tuple[tuple[str, Outcome], ...] = (
    ("explicit hard", "corrected"),
    ("knowledge", "corrected"),
    ("explicit", "kept"),
    ("explicit hard", "missed"),
)
"""The same for the README's picture."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: a number, a small line below it, and whether it is the best of its row."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Metrics by subset.

    Attributes:
        groups: Metric names, each spanning one column per system.
        columns: System names, repeated for each group.
        rows: Subset name, its number of queries, and the cells.
        has_change: Whether a last column compares the fine stage with the coarse one.
    """

    groups: list[str]
    columns: list[str]
    rows: list[tuple[str, int, list[Cell]]]
    has_change: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """One result in a gallery."""

    item_id: str
    image: bytes | None
    text: str
    cosine: float
    margin: float | None
    right: bool

    @property
    def source(self) -> str:
        """The thumbnail as a data URI; empty where the item is a text."""
        return "" if self.image is None else _data_uri(_thumbnail(self.image), "image/png")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The first results of one stage.

    Attributes:
        shown: What a gallery shows.
        right_rank: Where the first right one stands; None if it is not among the stored ones.
        depth: How many results were stored.
    """

    shown: list[Shown]
    right_rank: int | None
    depth: int


@dataclass(frozen=True, slots=True)
class Example:
    """A query with its coarse and, where there is one, its fine ranking."""

    text: str
    tags: list[str]
    outcome: Outcome
    label: str
    coarse: Ranking
    fine: Ranking | None


@dataclass(frozen=True)
class Runs:
    """Queries, relevance and the stored rankings of the trained system.

    Attributes:
        queries: By query id.
        relevant: Right item ids of each query.
        coarse: Rows of each query in rank order.
        fine: The same after the fine stage; empty if it did not run.
    """

    queries: dict[str, Record]
    relevant: dict[str, set[str]]
    coarse: dict[str, list[dict[str, Any]]]
    fine: dict[str, list[dict[str, Any]]]

    def outcome(self, query_id: str) -> Outcome:
        """How first places compare with the truth."""
        relevant = self.relevant[query_id]
        coarse = self.coarse[query_id][0]["item_id"] in relevant
        if not self.fine:
            return "found" if coarse else "lost"
        if self.fine[query_id][0]["item_id"] in relevant:
            return "kept" if coarse else "corrected"
        return "spoiled" if coarse else "missed"


def write_report(recipe: Recipe, timings: dict[str, float]) -> Path:
    """Write `report.html` into the run folder; parts without data are left out.

    Args:
        recipe: The run's recipe.
        timings: Seconds by stage, in order.

    Raises:
        DataError: The run has no evaluation results.
    """
    results = _results(recipe)
    runs = read_runs(recipe, results["systems"])
    history = recipe.storage.dir / "train" / "history.json"
    page = _template().render(
        recipe=recipe,
        results=results,
        settings=settings(recipe, results),
        command=reproduce_command(recipe),
        metrics=metric_context(results),
        systems=_headline(results),
        hits_chart=_svg(hits_chart(results)),
        training_chart=_svg(training_chart(read_json(history))) if history.is_file() else None,
        examples=examples(recipe, runs, _EXAMPLES) if runs else [],
        outcomes=outcome_counts(runs) if runs else [],
        timings=_timing_rows(timings),
    )
    path = recipe.storage.dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,  # jinja's own rule goes by the suffix, and .j2 would not be escaped
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _results(recipe: Recipe) -> dict[str, Any]:
    path = recipe.storage.evaluation / "results.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; run `slq eval` before the report")
    results: dict[str, Any] = read_json(path)
    order = [*SYSTEM_NAMES, *results["systems"]]  # the file sorts its keys
    systems = {name: results["systems"][name] for name in order if name in results["systems"]}
    measured = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    return {**results, "systems": systems, "measured": f"{measured:%Y-%m-%d %H:%M} UTC"}


# ---- settings ----


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
        ("index", recipe.index.kind),
    ]
    if "slq_fine" in results["systems"]:
        framing = rerank.framing.replace("_", "/")
        rows.append(("fine stage", f"{framing} question on the first {rerank.depth} candidates"))
    rows += [
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        ("versions", ", ".join(versions())),
        ("fingerprint", _adapter(recipe).get("fingerprint", "")),
    ]
    return [(name, value) for name, value in rows if value]


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
    demo = load_recipe(_HERE / "recipes" / "demo.yaml")
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


# ---- tables ----


def metric_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """The depths that were measured, the chance level, and the three tables."""
    systems = list(results["systems"])
    coarse = [name for name in systems if name != "slq_fine"]  # the fine stage asks by text only
    depths = hit_depths(results)
    reverse = all("image_to_text" in results["systems"][name] for name in coarse)
    return {
        "depths": depths,
        "chance": f"{100 * depths[0] / results['num_items']:.1f}",
        "first": metrics_table(results, "text_to_image", systems, depths[:1]),
        "deeper": metrics_table(results, "text_to_image", systems, depths[1:])
        if len(depths) > 1
        else None,
        "reverse": metrics_table(results, "image_to_text", coarse, depths)
        if coarse and reverse
        else None,
    }


def hit_depths(results: Mapping[str, Any]) -> list[int]:
    """The k of every hit@k in the results, ascending."""
    report = next(iter(results["systems"].values()))["text_to_image"]
    names = next(iter(report.values()))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"hit@(\d+)", name)))


def metrics_table(
    results: Mapping[str, Any], direction: str, systems: Sequence[str], depths: Sequence[int]
) -> Table:
    """hit@k of systems (columns) on subsets (rows), the best of each row marked.

    The table of hit@1 alone also compares the fine stage with the coarse one, where both ran.
    """
    p_values = results.get("fine_against_coarse_p") or {}
    has_change = bool(p_values) and list(depths) == [1] and {"slq", "slq_fine"} <= set(systems)
    reports = {name: results["systems"][name][direction] for name in systems}
    rows = []
    for subset, entry in next(iter(reports.values())).items():
        entries = [reports[name][subset] for name in systems]
        cells = [cell for k in depths for cell in _cells(entries, f"hit@{k}")]
        if has_change:
            change = reports["slq_fine"][subset]["hit@1"] - reports["slq"][subset]["hit@1"]
            cells.append(Cell(_signed(100 * change, 1), p_text(p_values[subset])))
        rows.append((subset, int(entry["num_queries"]), cells))
    names = [SYSTEM_NAMES.get(name, name) for name in systems]
    return Table([f"hit@{k}" for k in depths], names * len(depths), rows, has_change)


def _cells(entries: Sequence[Mapping[str, Any]], metric: str) -> list[Cell]:
    best = max(entry[metric] for entry in entries)
    cells = []
    for entry in entries:
        low, high = entry[f"{metric}_interval"]
        note = f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}"
        cells.append(Cell(f"{100 * entry[metric]:.1f}", note, best=entry[metric] == best))
    return cells


def p_text(value: float) -> str:
    """A p-value as papers print it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _headline(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The first subset's first metric of every system."""
    metric = f"hit@{hit_depths(results)[0]}"
    rows = []
    for name, report in results["systems"].items():
        entry = next(iter(report["text_to_image"].values()))
        colour = _COLOURS.get(name, _MUTED)
        value = f"{100 * entry[metric]:.1f}"
        rows.append({"name": SYSTEM_NAMES.get(name, name), "colour": colour, "value": value})
    return rows


def _timing_rows(timings: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Stage, seconds, and the share of the longest stage in percent."""
    longest = max(timings.values(), default=0.0) or 1.0
    return [(name, seconds, 100 * seconds / longest) for name, seconds in timings.items()]


# ---- charts ----


def hits_chart(results: Mapping[str, Any]) -> Figure:
    """Bars of the first hit@k by subset and system, with their 95% intervals."""
    systems = results["systems"]
    metric = f"hit@{hit_depths(results)[0]}"
    subsets = list(next(iter(systems.values()))["text_to_image"])
    subsets = [name for name in subsets if name != "all"] or subsets
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(systems)
    for n, (system, report) in enumerate(systems.items()):
        entries = [report["text_to_image"][name] for name in subsets]
        places = [s + (n - (len(systems) - 1) / 2) * width for s in range(len(subsets))]
        _bars(axes, places, entries, metric=metric, width=width, system=system)
    axes.set_xticks(range(len(subsets)), [name.replace(", ", ",\n") for name in subsets])
    axes.tick_params(axis="x", length=0, colors=_INK, labelsize=9.5)
    axes.set_ylabel(f"{metric} in %", color=_MUTED)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9.5)
    _plain(axes)
    return figure


def _bars(
    axes: Axes,
    places: Sequence[float],
    entries: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    width: float,
    system: str,
) -> None:
    values = [100 * entry[metric] for entry in entries]
    lows, highs = zip(*(entry[f"{metric}_interval"] for entry in entries), strict=True)
    below = [value - 100 * low for value, low in zip(values, lows, strict=True)]
    above = [100 * high - value for value, high in zip(values, highs, strict=True)]
    axes.bar(
        places,
        values,
        width=0.92 * width,
        color=_COLOURS.get(system, _MUTED),
        label=SYSTEM_NAMES.get(system, system),
        yerr=[[max(0.0, v) for v in below], [max(0.0, v) for v in above]],
        error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2.5},
    )
    for place, value, high in zip(places, values, highs, strict=True):
        top = (place, max(value, 100 * high))
        style: dict[str, Any] = {"ha": "center", "fontsize": 7.5, "color": _INK}
        axes.annotate(f"{value:.1f}", top, (0, 3), textcoords="offset points", **style)


def training_chart(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and learned temperature by step."""
    figure = Figure(figsize=(11, 2.7), layout="constrained")
    steps = [entry["step"] for entry in history]
    for axes, name, colour in zip(
        figure.subplots(1, 2), ("loss", "temperature"), ("#0072B2", "#D55E00"), strict=True
    ):
        marker = "o" if len(steps) < 2 else ""
        axes.plot(steps, [entry[name] for entry in history], color=colour, lw=1.8, marker=marker)
        axes.set_xlabel("step", color=_MUTED)
        axes.set_title(name, loc="left", fontsize=10.5, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="x", labelcolor=_MUTED, color=_LINE, labelsize=9)
        _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b1")
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelcolor=_MUTED, labelsize=9)


def _svg(figure: Figure) -> str:
    """A figure as a data URI; the same figure always gives the same bytes."""
    buffer = io.BytesIO()
    unsigned: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": "slq"}):
        figure.savefig(buffer, format="svg", metadata=unsigned)
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _thumbnail(data: bytes) -> bytes:
    image = decode_image(data)
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# ---- galleries ----


def read_runs(recipe: Recipe, systems: Iterable[str]) -> Runs | None:
    """The rankings of the trained system; None if it or its data files are missing.

    Args:
        recipe: The run's recipe.
        systems: What was measured; run files of earlier evaluations are ignored.

    Raises:
        DataError: The rankings belong to other queries.
    """
    coarse, fine = (
        _by_query(recipe.storage.evaluation / f"run_{name}.parquet") if name in systems else {}
        for name in ("slq", "slq_fine")
    )
    names = ("corpus", "queries", "relevance")
    if not coarse or not all(recipe.data.path(name).exists() for name in names):
        return None
    relevant: dict[str, set[str]] = {}
    for row in pq.read_table(recipe.data.path("relevance")).to_pylist():
        if row["grade"] > 0:
            relevant.setdefault(row["query_id"], set()).add(row["item_id"])
    queries = {record.id: record for record in _records(recipe.data.path("queries"))}
    _require(coarse, queries.keys() & relevant.keys(), recipe.data.path("queries"))
    return Runs(queries, relevant, coarse, fine)


def _require(wanted: Iterable[str], known: Container[str], path: Path) -> None:
    for name in wanted:
        if name not in known:
            raise DataError(
                f"{path} has no {name!r}, which was evaluated; run `slq eval` on the new data"
            )


def _records(path: Path) -> Iterator[Record]:
    for plan in plan_shards(path, _SHARD_ROWS):
        yield from read_shard(plan)


def _by_query(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a run file in rank order; empty if there is none."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        return rows
    for row in sorted(pq.read_table(path).to_pylist(), key=lambda row: int(row["rank"])):
        rows.setdefault(row["query_id"], []).append(row)
    return rows


def outcome_counts(runs: Runs) -> list[tuple[Outcome, str, int]]:
    """How many queries had each outcome: its key, its words and the number."""
    counts = Counter(runs.outcome(query_id) for query_id in runs.coarse)
    wanted = [key for key in _OUTCOMES if (key in ("found", "lost")) != bool(runs.fine)]
    return [(key, _OUTCOMES[key], counts[key]) for key in wanted]


def choose(runs: Runs, plan: Iterable[tuple[str, Outcome]]) -> list[str]:
    """Query ids for a plan of (group, outcome), from a fixed shuffle, and no right item twice.

    Where none has both, the outcome counts more than the group; else any query will do.
    """
    order = sorted(runs.coarse, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    used: set[str] = set()
    chosen = []
    for slot in plan:
        free = [name for name in order if not runs.relevant[name] & used]
        if free:
            chosen.append(max(free, key=partial(_fit, runs, slot)))  # the first of the best
            used |= runs.relevant[chosen[-1]]
    return chosen


def _fit(runs: Runs, slot: tuple[str, Outcome], name: str) -> tuple[bool, bool]:
    group, outcome = slot
    return runs.outcome(name) == outcome, _group(runs.queries[name]) == group


def _group(query: Record) -> str:
    kind = str(query.columns.get("kind"))
    if query.columns.get("split") == "unseen":
        return f"{kind} unseen"
    return f"{kind} hard" if query.columns.get("hard") and kind == "explicit" else kind


def examples(recipe: Recipe, runs: Runs, plan: Iterable[tuple[str, Outcome]]) -> list[Example]:
    """The chosen queries with their rankings and images."""
    chosen = choose(runs, plan)
    stages = (runs.coarse, runs.fine)
    rows = [row for stage in stages for name in chosen for row in stage.get(name, [])[:_SHOWN]]
    wanted = {row["item_id"] for row in rows}
    items = {item.id: item for item in _records(recipe.data.path("corpus")) if item.id in wanted}
    _require(wanted, items, recipe.data.path("corpus"))
    return [_example(name, runs, items) for name in chosen]


def _example(name: str, runs: Runs, items: Mapping[str, Record]) -> Example:
    query, outcome = runs.queries[name], runs.outcome(name)
    columns, relevant = query.columns, runs.relevant[name]
    hard = "hard subset" if columns.get("hard") else None
    unseen = "unseen objects" if columns.get("split") == "unseen" else None
    tags = (columns.get("kind"), columns.get("category"), hard, unseen)
    return Example(
        text=query.text or name,
        tags=[str(tag).replace("_", " ") for tag in tags if tag],
        outcome=outcome,
        label=_OUTCOMES[outcome],
        coarse=_ranking(runs.coarse[name], relevant, items),
        fine=_ranking(runs.fine[name], relevant, items) if runs.fine else None,
    )


def _ranking(
    rows: Sequence[Mapping[str, Any]], relevant: set[str], items: Mapping[str, Record]
) -> Ranking:
    shown = [
        Shown(
            item_id=row["item_id"],
            image=items[row["item_id"]].image,
            text=items[row["item_id"]].text or "",
            cosine=row["coarse_score"],
            margin=row["fine_score"],
            right=row["item_id"] in relevant,
        )
        for row in rows[:_SHOWN]
    ]
    ranks = (row["rank"] for row in rows if row["item_id"] in relevant)
    return Ranking(shown, next(ranks, None), len(rows))


# ---- the README's picture ----

_WIDTH, _TILE, _STEP, _ROW, _TOP = 1200, 96, 112, 178, 46
_LEFT, _MIDDLE = 24, 632
_OUTCOME_COLOURS: dict[Outcome, str] = {
    "corrected": _RIGHT,
    "kept": _MUTED,
    "spoiled": "#a8430b",
    "missed": "#a8430b",
    "found": _RIGHT,
    "lost": "#a8430b",
}


def gallery_picture(recipe: Recipe, path: Path) -> Path | None:
    """Draw a few queries with their coarse and fine results as a PNG, 1200 pixels wide.

    Returns:
        `path`, or None where the run has nothing to show.
    """
    runs = read_runs(recipe, _results(recipe)["systems"])
    if runs is None:
        return None
    shown = examples(recipe, runs, _PICTURED)
    picture = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(shown)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_LEFT, 16), f"coarse top {_SHOWN}, by cosine", fill=_MUTED, font=_font(15))
    if runs.fine:
        draw.text((_MIDDLE, 16), f"fine top {_SHOWN}, by margin", fill=_MUTED, font=_font(15))
    for n, example in enumerate(shown):
        top = _TOP + n * _ROW
        _draw_heading(draw, example, top=top)
        for left, ranking in ((_LEFT, example.coarse), (_MIDDLE, example.fine)):
            for place, result in enumerate(ranking.shown if ranking else []):
                _draw_result(picture, result, left=left + place * _STEP, top=top + 42)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
    return path


def _draw_heading(draw: ImageDraw.ImageDraw, example: Example, *, top: int) -> None:
    """A rule, the query on the left and its outcome on the right."""
    draw.line((_LEFT, top, _WIDTH - _LEFT, top), fill=_LINE)
    label, small = example.label, _font(14)
    last = example.fine or example.coarse
    if not any(result.right for result in (*example.coarse.shown, *last.shown)):
        place = (
            f"below rank {last.depth}" if last.right_rank is None else f"at rank {last.right_rank}"
        )
        label += f", right one {place}"
    right = _WIDTH - _LEFT
    colour = _OUTCOME_COLOURS[example.outcome]
    draw.text((right, top + 13), label, fill=colour, font=small, anchor="ra")
    room = right - _LEFT - draw.textlength(label, font=small) - 24
    text, font = " ".join(example.text.split()), _font(17, bold=True)
    while draw.textlength(text, font=font) > room:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    draw.text((_LEFT, top + 10), text, fill=_INK, font=font)


def _draw_result(picture: Image.Image, result: Shown, *, left: int, top: int) -> None:
    """A thumbnail with its score; a right one has a green frame and a check mark."""
    draw = ImageDraw.Draw(picture)
    if result.image is None:
        draw.rectangle((left, top, left + _TILE, top + _TILE), fill="#f2f4f7")
        draw.text((left + 6, top + 6), result.text[:14], fill=_INK, font=_font(11))
    else:
        tile = ImageOps.pad(decode_image(result.image), (_TILE, _TILE), color="#f2f4f7")
        picture.paste(tile, (left, top))
    if result.right:
        draw.rectangle((left - 4, top - 4, left + _TILE + 3, top + _TILE + 3), None, _RIGHT, 4)
        x, y = left + _TILE, top
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=_RIGHT, outline="white", width=2)
        draw.line((x - 6, y, x - 2, y + 5, x + 6, y - 5), fill="white", width=3, joint="curve")
    score = f"{result.cosine:.3f}" if result.margin is None else _signed(result.margin, 2)
    centre = (left + _TILE / 2, top + _TILE + 8)
    colour = _RIGHT if result.right else _MUTED
    draw.text(centre, score, fill=colour, font=_font(13, bold=result.right), anchor="ma")


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships, so that every machine draws the same picture."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)
