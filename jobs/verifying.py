"""`slq verify`: the check of a data set inside Ray, and what is shown of its report."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from pipelines.verification.findings import CHECKS, Finding, Report

_WHAT = {
    "files": "files of shards",
    "counts": "commit records",
    "schema": "files with the right columns",
    "rows": "rows",
    "vectors": "vectors",
    "ids": "ids",
    "embedding": "vectors made anew",
}
_SHOWN = 20


def checked(location: str, adapters: Sequence[Path], sample: int, device: str) -> Report:
    """Check a data set; errors as `pipelines.verify.verify`. An unfinished one is refused before Ray is started."""
    from pipelines.ledger import Ledger
    from pipelines.recipe import ResourcesConfig
    from pipelines.runtime import connect
    from pipelines.verify import finished_manifest, verify

    finished_manifest(Ledger(location))
    with connect(ResourcesConfig(gpus_per_worker=int(device.startswith("cuda")))):
        return verify(location, adapters=adapters, sample=sample, device=device)


def checks_table(report: Report) -> Table:
    """A line per check: how much it looked at, and how much it found."""
    table = Table("check", "looked at", "result", box=None)
    for check in CHECKS:
        count = sum(finding.check == check for finding in report.findings)
        looked = report.checked[check]
        result = "[green]ok[/]" if looked else "[dim]nothing to look at[/]"
        if count:
            result = f"[red]{count} finding{'s' if count > 1 else ''}[/]"
        table.add_row(check, f"{looked:,} {_WHAT[check]}", result)
    return table


def finding_lines(findings: list[Finding]) -> list[str]:
    """The first findings, for the console; a data set that is damaged all over has thousands."""
    lines = [
        f"[red]{one.check}[/] {escape(one.place)}: {escape(one.message)}"
        for one in findings[:_SHOWN]
    ]
    if len(findings) > _SHOWN:
        lines.append(f"and {len(findings) - _SHOWN} more; --json shows all")
    return lines
