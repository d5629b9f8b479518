"""Which cells a sweep has, and whether they can be built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from slq.config import Section
from slq.errors import ConfigError
from slq.index.config import Codes, IndexConfig
from slq.sweeps.precision import Precision

FLAT: Literal["flat"] = "flat"
IndexName = Literal["flat", Codes]
KS = (1, 5, 10)
"""Depths of hit@k."""
RECALL_AT = 10
"""Depth of recall against exact search."""
T = TypeVar("T")


def _different(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)} must be different from one another")
    return values


Each = AfterValidator(_different)


class SweepConfig(Section):
    """What `slq sweep` combines: every dimension with every precision, index and depth."""

    dimensions: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Each] = ()
    """Lengths that vectors are cut to, as with `embed.dimension`; the stored vectors' own if empty."""
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1), Each] = (
        "float32",
        "float16",
        "int8",
        "binary",
    )
    """How vectors are stored: `float32`, `float16`, `int8` or `binary`, gallery and queries alike."""
    indexes: Annotated[tuple[IndexName, ...], Field(min_length=1), Each] = (FLAT, "rabitq")
    """What searches them: `flat` compares with all that is stored; the others are lists with these `index.codes`, made
    of what is stored, with `num_lists`, `num_probes`, `rotation` and `oversample` of the section `index`."""
    depths: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), Each] = (
        0,
        5,
        10,
        20,
    )
    """Candidates that the fine stage scores; 0 is the coarse ranking alone."""
    num_threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads of a search while it is timed."""
    timed_queries: Annotated[int, Field(gt=0)] = 50
    """Queries that are timed, each alone; spread over all, fewer where there are fewer."""
    timed_fine_queries: Annotated[int, Field(gt=0)] = 8
    """Queries of which the embedding and the fine stage are timed."""
    rounds: Annotated[int, Field(gt=0)] = 5
    """Rounds over the timed queries, after one that is not counted."""


@dataclass(frozen=True, order=True)
class Cell:
    """One way to search, apart from the fine stage."""

    dimension: int
    precision: Precision
    index: IndexName

    @property
    def name(self) -> str:
        """For people, and in files."""
        return f"{self.dimension} {self.precision} {self.index}"

    def config(self, base: IndexConfig) -> IndexConfig:
        """How the index of the cell is built and searched, by the settings of a recipe; on the CPU.

        Raises:
            pydantic.ValidationError: Never, for what a recipe holds.
        """
        wanted = {"kind": "flat"} if self.index == FLAT else {"kind": "ivf", "codes": self.index}
        others = {"goal": None, "words": False, "device": "cpu", "search_device": "cpu"}
        return IndexConfig.model_validate({**base.model_dump(), **others, **wanted})


def cells_of(config: SweepConfig, dimension: int) -> list[Cell]:
    """All cells, in the order of the settings.

    Args:
        config: The sweep's.
        dimension: Of the stored vectors.
    """
    return [
        Cell(length, precision, index)
        for length in config.dimensions or (dimension,)
        for precision in config.precisions
        for index in config.indexes
    ]


def require_buildable(
    cells: Sequence[Cell],
    config: SweepConfig,
    base: IndexConfig,
    *,
    dimension: int,
    count: int | None,
) -> None:
    """Refuse the first cell that cannot be built, by its name, before any work is done.

    Args:
        cells: As of `cells_of`.
        config: The sweep's.
        base: The section `index`.
        dimension: Of the vectors that there are.
        count: Items of the gallery; None where nobody knows yet.

    Raises:
        ConfigError: The vectors are shorter than a cell wants, or the items too few for its lists or for a depth.
    """
    for cell in cells:
        if cell.dimension > dimension:
            raise ConfigError(
                f"sweep: cell {cell.name!r} cannot be built: the vectors have {dimension} values; take it out of "
                "sweep.dimensions"
            )
        problem = None if count is None else cell.config(base).unfit(count, cell.dimension)
        if problem is not None:
            raise ConfigError(f"sweep: cell {cell.name!r} cannot be built: {problem}")
    if count is not None and max(config.depths) > count:
        raise ConfigError(
            f"sweep: depth {max(config.depths)} cannot be re-ranked: there are {count} items; take it out of "
            "sweep.depths"
        )
