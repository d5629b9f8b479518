"""What `slq plan` shows of an estimate."""

from rich.table import Table

from pipelines.embedding.costs import Estimate
from pipelines.progress import duration

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def estimate_table(found: Estimate) -> Table:
    """A line per number, with what it is told from."""
    table = Table("what", "how much", "", box=None)
    for what, how_much, why in _lines(found):
        table.add_row(what, how_much, f"[dim]{why}[/]")
    return table


def _lines(found: Estimate) -> list[tuple[str, str, str]]:
    told = "estimated from the size of the files" if found.rows_are_estimated else "counted"
    sample = f"in a sample of {found.sampled_rows:,} rows"
    return [
        ("rows", f"{found.rows:,}", told),
        ("shards", f"{found.shards:,}", ""),
        ("corpus files", amount(found.input_bytes), ""),
        ("images and texts", amount(found.item_bytes), "that will be read"),
        ("data set", amount(found.output_bytes), "in shards"),
        ("quarantined", f"{found.quarantined_share:.1%}", sample),
        ("padding", f"{found.padding_share:.1%}", "of the encoders' tokens"),
        ("one encoder", f"{found.encoder_rows_per_s:.1f} rows/s", "if it never waits"),
        ("one preparing CPU", f"{found.preparing_rows_per_s:.1f} rows/s", ""),
        ("encoders", str(found.encoders), ""),
        (
            "preparing CPUs",
            str(found.preparing_cpus),
            f"the encoders need {found.preparing_cpus_needed}",
        ),
        ("encoder-hours", f"{found.encoder_hours:.3g}", f"{found.gpu_hours:.3g} GPU-hours"),
        ("CPU-hours", f"{found.cpu_hours:.3g}", "to prepare and to write"),
        ("cost", f"{found.cost:,.2f}", f"at {found.price_per_encoder_hour:.2f} per encoder-hour"),
        (
            "ETA",
            duration(found.eta_s),
            f"at {found.rows_per_s:.1f} rows/s, after the models are loaded",
        ),
    ]


def amount(num_bytes: float) -> str:
    """Bytes as people read them: `17 B`, `4.2 MB`."""
    size, unit = float(num_bytes), 0
    while size >= 999.5 and unit < len(_BYTES) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_BYTES[unit]}"
