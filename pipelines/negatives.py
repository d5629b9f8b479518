"""Mined negatives of training pairs, as `slq mine` writes them, in the numbering of a run."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from slq.errors import ConfigError, DataError

_ABSENT = -1
_COLUMNS = ("id", "negatives", "margins")


@dataclass(frozen=True)
class MinedNegatives:
    """Wrong images of each caption.

    Attributes:
        pairs: (pairs, num_negatives) int64, pairs whose image is wrong for the row's caption, the most similar first;
            -1 where there are fewer.
        margins: (pairs, 1 + num_negatives) float32 in nats, the pair's own image first, NaN where unknown; None where
            the fine stage was not asked.
    """

    pairs: NDArray[np.int64]
    margins: NDArray[np.float32] | None

    def of(
        self, rows: Sequence[int], bad: Container[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Negatives of some pairs.

        Args:
            rows: The pairs.
            bad: Pairs that turned out to be unusable.

        Returns:
            (rows, num_negatives) int64 pairs and bool presence; where one is absent the row's own pair stands in.
        """
        own = np.asarray(rows, dtype=np.int64)[:, None]
        chosen = self.pairs[own[:, 0]]
        broken = np.array([[int(pair) in bad for pair in row] for row in chosen], dtype=bool)
        present = (chosen != _ABSENT) & ~broken.reshape(chosen.shape)
        return np.where(present, chosen, own), present

    def margins_of(self, rows: Sequence[int]) -> NDArray[np.float32] | None:
        """(rows, 1 + num_negatives) margins of some pairs, zero where unknown."""
        return None if self.margins is None else np.nan_to_num(self.margins[np.asarray(rows)])


def require_negatives(path: Path) -> None:
    """Check that there are mined negatives.

    Raises:
        ConfigError: There is no such file.
    """
    if not path.is_file():
        raise ConfigError(
            f"train.negatives needs data.negatives, and {path} does not exist; run `slq mine` first, with an adapter "
            "that was trained without"
        )


def read_negatives(
    path: Path,
    ids: Sequence[str | None],
    image_keys: Sequence[str],
    num_negatives: int,
    *,
    teacher: bool,
) -> MinedNegatives:
    """Read the negatives of a run's pairs.

    Negatives that are not among the pairs, such as held-out ones, are left out, and so is a pair's own image.

    Args:
        path: As `slq mine` writes it.
        ids: Of the run's pairs.
        image_keys: Of the run's pairs.
        num_negatives: Most of each pair.
        teacher: Whether the margins are needed.

    Raises:
        ConfigError: There is no such file, or no margins in it.
        DataError: The file has other columns, or none of the pairs.
    """
    require_negatives(path)
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as mined negatives: {error}; run `slq mine` again"
        ) from None
    place = {name: n for n, name in enumerate(ids) if name is not None}
    pairs = np.full((len(ids), num_negatives), _ABSENT, dtype=np.int64)
    margins = np.full((len(ids), 1 + num_negatives), np.nan, dtype=np.float32)
    mined = 0
    columns = (table[name].to_pylist() for name in _COLUMNS)
    for name, found, scores in zip(*columns, strict=True):
        row = place.get(name)
        if row is None:
            continue
        if teacher and scores is None:
            raise ConfigError(
                f"train.distillation needs the fine stage's margins, and {path} has none; run `slq mine` with "
                "--set mine.margins=true"
            )
        usable = [
            (n, place[other])
            for n, other in enumerate(found or [])
            if other in place and image_keys[place[other]] != image_keys[row]
        ][:num_negatives]
        mined += 1
        pairs[row, : len(usable)] = [pair for _, pair in usable]
        if teacher:
            margins[row, 0] = scores[0]
            margins[row, 1 : 1 + len(usable)] = [scores[1 + n] for n, _ in usable]
    if not mined:
        raise DataError(f"{path} holds none of this run's pairs; run `slq mine` on the same data")
    return MinedNegatives(pairs, margins if teacher else None)
