"""What a benchmark is: a config that reads its publisher's files, facts about it, and the tables that stages read.

A module of this package that adds a benchmark defines a `BenchmarkConfig` and enters it in `registry`; `writing` checks
what it has read and writes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from pydantic import Field

from slq.benchmarks.tables import uri_prefix
from slq.config import Section
from slq.errors import DataError

EVERY_KIND = ""
"""Key of `Facts.headline` for kinds that have no metrics of their own."""
_COCO_METRICS = ("hit@1", "hit@5", "hit@10")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a benchmark apart from its rows.

    Attributes:
        name: As in `published`.
        split: Which part of it.
        source: Where its publisher offers the files.
        direction: What looks for what, such as `text -> image`.
        counts: What the whole benchmark counts; wrong ones are refused unless the config says others.
        headline: Metrics that papers report, by kind of query; EVERY_KIND stands for the others.
        groups: Name -> kinds whose numbers are averaged, each kind once however many queries it has.
        overall: Name of the subset of all queries; None where only kinds are reported.
        both_ways: Whether items looking for queries are measured too.
        is_published: Whether this is the part that papers report, all of it, so that their numbers may stand beside
            ours.
        published_groups: Groups that hold all kinds that the papers average.
    """

    name: str
    split: str
    source: str
    direction: str = "text -> image"
    counts: Mapping[str, int] = field(default_factory=dict)
    headline: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {EVERY_KIND: _COCO_METRICS}
    )
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    overall: str | None = None
    both_ways: bool = False
    is_published: bool = False
    published_groups: tuple[str, ...] = ()

    @property
    def depths(self) -> set[int]:
        """Every k of the headline metrics."""
        named = (metric for metrics in self.headline.values() for metric in metrics)
        return {int(metric.partition("@")[2]) for metric in named}

    def plain(self) -> dict[str, Any]:
        """As JSON, without the counts: those that were found stand beside it."""
        return {
            "name": self.name,
            "split": self.split,
            "source": self.source,
            "direction": self.direction,
            "headline": {kind: list(metrics) for kind, metrics in self.headline.items()},
            "groups": {name: list(kinds) for name, kinds in self.groups.items()},
            "is_published": self.is_published,
            "published_groups": list(self.published_groups),
        }


@dataclass(frozen=True, slots=True)
class Entry:
    """An item or a query.

    Attributes:
        id: Unique among the items, or among the queries.
        text: The text, or None.
        uri: Where the image is, as in the tables; None without one.
        image: Its bytes, where the publisher's file holds them.
        kind: Of a query: the subset that it is reported in.
        query_group: Of a query: what the wordings of one query share. Their scores are averaged, which ranks as their
            sum does, and the other tables name the group instead of the wordings.
        pool: A query that has one ranks only the items that have the same.
    """

    id: str
    text: str | None = None
    uri: str | None = None
    image: bytes | None = None
    kind: str | None = None
    query_group: str | None = None
    pool: str | None = None


@dataclass(frozen=True, slots=True)
class Tables:
    """A benchmark as read from its publisher's files.

    Attributes:
        gallery: Items, in an order that says nothing of which is right.
        queries: Queries, or the wordings of queries.
        relevance: (query or group, item) that are right answers.
        candidates: The only items that a query ranks, if it does not rank all (of its pool).
        excluded: Items that a query does not rank.
        train: Rows of a training file, or None.
        counts: What was found, under the names of `Facts.counts`.
        where: The file to look into when something is wrong with an id.
    """

    gallery: Sequence[Entry]
    queries: Sequence[Entry]
    relevance: Sequence[tuple[str, str]]
    where: Path
    counts: Mapping[str, int]
    candidates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    excluded: Mapping[str, Sequence[str]] = field(default_factory=dict)
    train: Sequence[Mapping[str, Any]] | None = None


class BenchmarkConfig(Section, ABC):
    """Settings that all benchmarks share; relative paths of theirs belong to `data.dir`."""

    unique_names: ClassVar[bool] = True
    """Whether a file name says which image it is, so that training files are searched for it in any folder."""

    expected: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """Counts that must be found, in place of those of the whole benchmark; `{}` checks none."""

    @property
    def writes_train(self) -> bool:
        """Whether `train.parquet` is made too."""
        return False

    @abstractmethod
    def facts(self) -> Facts:
        """What is known of the benchmark with these settings."""

    @abstractmethod
    def sources(self, folder: Path) -> list[Path]:
        """The publisher's files, apart from images, in order.

        Raises:
            ConfigError: One is missing.
        """

    @abstractmethod
    def read(self, folder: Path) -> Tables:
        """Everything, from those files.

        Raises:
            ConfigError: A file is missing, or images lie outside `folder`.
            DataError: A file or a record is malformed.
        """


class ImagePlace:
    """Makes `uri`s of a publisher's image paths.

    Args:
        folder: The tables' folder.
        images: The config's `images`.

    Raises:
        ConfigError: The images lie outside `folder`.
    """

    def __init__(self, folder: Path, images: str) -> None:
        self._prefix = uri_prefix(folder, images, "data.benchmark.images")

    def uri(self, path: str, where: str) -> str:
        """The uri of an image.

        Args:
            path: As the publisher writes it, relative to the images' folder.
            where: The record, for messages.

        Raises:
            DataError: The path is absolute or leaves the folder.
        """
        place = PurePosixPath(path)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise DataError(f"{where}: image path {path!r} must stay below data.benchmark.images")
        return self._prefix + str(place)
