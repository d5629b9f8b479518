"""What parts found, as tables for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

_PERCENTILES = ("p50", "p90", "p99", "p99.9")


def tables_of(part: str, found: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of one part's result."""
    makers = {
        "overhead": _overhead,
        "latency": _latency,
        "overload": _overload,
        "chaos": _chaos,
        "autoscale": _autoscale,
    }
    yield from makers[part](found)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    return table


def _ms(values: Mapping[str, float | None]) -> list[str]:
    return [_number(values[name]) for name in _PERCENTILES]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _overhead(found: Mapping[str, Any]) -> Iterator[Table]:
    table = _table("milliseconds of one client", "side", *_PERCENTILES, "parts (median)")
    for name, values in found["sides_ms"].items():
        parts = found["parts_ms"].get(name, {})
        told = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
        table.add_row(name, *_ms(values), told)
    table.add_section()
    for kind, value in found["overhead_ms"].items():
        table.add_row(f"{kind}: ours - noop - direct", _number(value), *[""] * 4)
    for kind, value in found["overhead_after_pauses_ms"].items():
        table.add_row(f"{kind}: ours - noop - paused", _number(value), *[""] * 4)
    table.add_row("a call by handle", _number(found["handle_ms"]), *[""] * 4)
    yield table


def _modes(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for mode, values in found.items():
        if isinstance(values, Mapping):
            yield mode, values


def _latency(found: Mapping[str, Any]) -> Iterator[Table]:
    for mode, values in _modes(found):
        columns = ("sent/s", "done/s", *_PERCENTILES, "refused", "failed", "degr.", "lag")
        table = _table(f"{mode} search: ms from when a request was due", *columns)
        for row in values["rates"]:
            table.add_row(
                _number(row["offered_per_s"], 1),
                _number(row["answered_per_s"], 1),
                *_ms(row["latency_ms"]),
                f"{row['refused_share']:.1%}",
                str(row["failures"]["count"]),
                f"{row['degraded_share']:.1%}",
                _number(row["client_lag_ms"]["p99"]),
            )
        yield table


def _overload(found: Mapping[str, Any]) -> Iterator[Table]:
    for mode, values in _modes(found):
        runs = values["runs"]
        columns = (f"{run['factor']:g}x" for run in runs)
        title = f"{mode} search, peak {values['peak_goodput_per_s']:.1f}/s"
        table = _table(title, "at the peak's rate times", *columns)
        for row in zip(*(_of_run(run).items() for run in runs), strict=True):
            table.add_row(row[0][0], *(cell for _, cell in row))
        yield table


def _of_run(run: Mapping[str, Any]) -> dict[str, str]:
    refusals, memory = run["refusals"], run["memory"]
    share = refusals["with_retry_after"]
    return {
        "offered per second": _number(run["offered_per_s"], 1),
        "answered in time per second": _number(run["goodput_per_s"], 1),
        "of the peak": _number(run["to_peak"]),
        "of the runs before and after": _number(run["to_neighbours"]),
        "refused": f"{run['refused_share']:.1%}",
        "failed": str(run["failures"]["count"]),
        "ms to refuse, p50": _number(refusals["time_ms"]["p50"], 1),
        "ms to refuse, p99": _number(refusals["time_ms"]["p99"], 1),
        "with Retry-After": "-" if share is None else f"{share:.1%}",
        "ms of an empty app beside it, p99": _number(run["beside_ms"]["noop"]["p99"], 1),
        "ms of a server without Ray, p99": _number(run["beside_ms"]["bare"]["p99"], 1),
        "client late by ms, p99": _number(run["client_lag_ms"]["p99"], 1),
        "MiB per minute, second half": _number(memory["second_half_slope_mib_per_min"]),
        "most memory / first": _number(memory["max_to_first"], 3),
    }


def _chaos(found: Mapping[str, Any]) -> Iterator[Table]:
    columns = ("fault", "requests", "failed", "wrong", "degraded", "slowest ms", "healed s", "how")
    table = _table(f"faults at {found['rate']:g}/s, seed {found['seed']}", *columns)
    rows = {"before": found["before_faults"]}
    for one in found["faults"]:
        name = f"{one['signal']} {one['kind']}"
        while name in rows:
            name += " again"
        rows[name] = one
    for name, row in {**rows, "all": found["all"]}.items():
        table.add_row(
            name,
            *(str(row[key]) for key in ("requests", "failed", "wrong", "degraded")),
            _number(row["slowest_ms"], 0),
            _number(row.get("healed_s"), 1),
            ", ".join(f"{count} {kind}" for kind, count in row["failures"].items()),
        )
    yield table


def _autoscale(found: Mapping[str, Any]) -> Iterator[Table]:
    columns = ("phase", "offered/s", "answered/s", *_PERCENTILES, "refused", "changes", "replicas")
    table = _table("a load that steps and jumps", *columns)
    for name, row in found["phases"].items():
        replicas = ", ".join(f"{key} {count}" for key, count in row["replicas_at_the_end"].items())
        table.add_row(
            name,
            _number(row["offered_per_s"], 1),
            _number(row["answered_per_s"], 1),
            *_ms(row["latency_ms"]),
            f"{row['refused_share']:.1%}",
            str(row["changes"]),
            replicas,
        )
    yield table
