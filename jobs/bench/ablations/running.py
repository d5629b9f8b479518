"""Rows one after another; what is finished stays in a folder with what it depends on, and is not measured again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.bench.ablations.kept import measure_levels
from jobs.bench.ablations.measuring import measured
from jobs.bench.ablations.reading import VERSION, Reader
from jobs.bench.ablations.settings import Row, digest
from jobs.bench.ablations.subject import Subject
from pipelines.progress import show
from slq.errors import ArtifactError, ConfigError
from slq.files import read_json, write_json

LEVELS = "kept"  # the name of the part that is no row
_LEVEL_QUERIES = 64


class Bench:
    """Measures rows into a folder.

    Args:
        subject: What is measured on.
        folder: Where finished rows and scores of pairs go.
        batch_size: Pairs per pass.

    Attributes:
        reader: Reads pairs.
    """

    def __init__(self, subject: Subject, folder: Path, *, batch_size: int = 64) -> None:
        self._rows = folder / "rows"
        for part in (self._rows, folder / "scores"):
            part.mkdir(parents=True, exist_ok=True)
        self.reader = Reader(subject, folder / "scores", batch_size=batch_size)
        self._subject = digest(subject.identity)

    def measure(self, rows: Sequence[Row]) -> None:
        """Measure those of some rows that are not finished."""
        left = [row for row in rows if self.finished(row) is None]
        self.reader.meter.begin(self.reader.images_to_show(left))
        for row in left:
            result: dict[str, Any]
            try:
                result = measured(self.reader, row)
            except ConfigError as error:  # a model that cannot carry a row is told, too
                result = {"problem": str(error)}
            told = {"name": row.name, "group": row.group, "says": row.says}
            self._keep(row.name, self._identity(row), {**told, **result})
            show(f"{row.name}: {result.get('problem') or _hits(result)}")

    def finished(self, row: Row) -> dict[str, Any] | None:
        """The result of a row that was measured on the same subject in the same way."""
        return self._kept(row.name, self._identity(row))

    def levels(
        self, framing: str, depth: int, repeats: int, *, fresh: bool
    ) -> dict[str, Any] | None:
        """What each level of kept images is worth, of the first queries' candidates.

        Args:
            framing: Of the pairs.
            depth: Candidates of each query.
            repeats: Rounds.
            fresh: Whether to measure what is not there.
        """
        identity = {"subject": self._subject, "levels": [framing, depth, repeats], "v": VERSION}
        found = self._kept(LEVELS, identity)
        if found is None and fresh:
            show(f"{LEVELS}: {repeats} rounds")
            subject = self.reader.subject
            pairs = self.reader.items(subject.candidates(depth)[: _LEVEL_QUERIES * depth])
            found = measure_levels(subject.backbone, framing, pairs, repeats=repeats)
            self._keep(LEVELS, identity, found)
        return found

    def _identity(self, row: Row) -> dict[str, Any]:
        return {"subject": self._subject, "row": row.identity(), "version": VERSION}

    def _keep(self, name: str, identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        write_json(self._rows / f"{name}.json", {"identity": identity, "result": result})

    def _kept(self, name: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            stored = read_json(self._rows / f"{name}.json")
        except ArtifactError:
            return None
        if digest(stored.get("identity")) != digest(identity):  # JSON knows no tuples
            return None
        result: dict[str, Any] = stored["result"]
        return result


def _hits(result: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{kind} {100 * one['value']:.1f}" for kind, one in result["hits"].items())
    return f"hit@1 in % {shares}"
