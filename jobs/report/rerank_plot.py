"""A picture of what re-ranking gained, and of how far its probabilities can be trusted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.report.charts import plain
from jobs.report.style import COLOURS, INK, LINE, MUTED

_COLOURS = {"coarse": COLOURS["slq"], "fine": COLOURS["slq_fine"], "fused": COLOURS["slq_index"]}
_NAMES = {"before": "sigmoid(margin)", "after": "with the fitted temperature"}


def write_rerank_plot(result: Mapping[str, Any], target: Path) -> Path | None:
    """Draw what `pipelines.rerank.rerank` returned; nothing where no query was judged.

    Args:
        result: As it was returned.
        target: A `.png` file; replaced if it exists.
    """
    if not result.get("judged"):
        return None
    rerank_figure(result).savefig(target, dpi=144, metadata={"Software": None})
    return target


def rerank_figure(result: Mapping[str, Any]) -> Figure:
    """hit@k of each order, and reliability where a calibration was fitted.

    Args:
        result: With judged queries.
    """
    held_out = result.get("held_out", {})
    reliability = held_out.get("calibration", {}).get("reliability")
    figure = Figure(figsize=(10 if reliability else 5.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2 if reliability else 1, squeeze=False)[0]
    _hits(panels[0], held_out.get("systems") or result["systems"])
    if reliability:
        _reliability(panels[1], held_out["calibration"], reliability)
    return figure


def _hits(axes: Axes, systems: Mapping[str, Any]) -> None:
    entry = next(iter(systems.values()))
    ks = sorted(int(name[4:]) for name in entry if name.startswith("hit@") and "_" not in name)
    width = 0.8 / len(systems)
    for n, (name, report) in enumerate(systems.items()):
        values = [100 * report[f"hit@{k}"] for k in ks]
        intervals = [report[f"hit@{k}_interval"] for k in ks]
        errors = [
            [
                max(0.0, value - 100 * low)
                for value, (low, _) in zip(values, intervals, strict=True)
            ],
            [
                max(0.0, 100 * high - value)
                for value, (_, high) in zip(values, intervals, strict=True)
            ],
        ]
        axes.bar(
            [place + (n - (len(systems) - 1) / 2) * width for place in range(len(ks))],
            values,
            width=0.92 * width,
            color=_COLOURS[name],
            label=name,
            yerr=errors,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
        )
    axes.set_xticks(range(len(ks)), [f"hit@{k}" for k in ks])
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of queries (95% interval)", color=MUTED)
    axes.set_title(f"{entry['num_queries']:,} queries", loc="left", fontsize=10, color=INK)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
        borderpad=0,
    )
    plain(axes)


def _reliability(
    axes: Axes, calibration: Mapping[str, Any], bins: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.2, zorder=1)
    for name, colour in (("before", MUTED), ("after", COLOURS["slq_fine"])):
        points = bins[name]
        error = calibration["expected_calibration_error"][name]
        axes.plot(
            [point["probability"] for point in points],
            [point["matches"] for point in points],
            marker="o",
            markersize=4,
            color=colour,
            label=f"{_NAMES[name]}: error {100 * error:.1f}%",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability that is said", color=MUTED)
    axes.set_ylabel("share of matches", color=MUTED)
    axes.set_title(
        f"{calibration['pairs']:,} pairs of queries that nothing was fitted to",
        loc="left",
        fontsize=10,
        color=INK,
    )
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    plain(axes)
