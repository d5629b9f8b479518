"""SugarCrepe: an image and two captions, of which one is wrong in a word or two (Hsieh et al., NeurIPS 2023).

Reads `data/CATEGORY.json` of https://github.com/RAIVNLab/sugar-crepe: {number: {filename, caption, negative_caption}},
whose numbers may have gaps, with images of COCO's val2017. Every query is an image that ranks its two captions.

`positive` says which caption stands first in the gallery. Nothing but ties can make the answer depend on it, and hit@1
counts ties as wrong; `depends_on_order` in the results says how many answers would change with the other order.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slq.benchmarks.contract import EVERY_KIND, BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.records import read_json, require_files, text_of, value_of
from slq.errors import DataError

SOURCE = "https://github.com/RAIVNLab/sugar-crepe (data) and COCO's val2017"
Category = Literal[
    "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj", "add_att", "add_obj"
]
CATEGORIES: dict[Category, int] = {
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
    "add_att": 692,
    "add_obj": 2062,
}
"""Triples of each category in the published files."""
GROUPS: dict[str, tuple[str, ...]] = {
    name: tuple(one for one in CATEGORIES if one.startswith(name))
    for name in ("replace", "swap", "add")
}
"""Categories that are averaged."""


class SugarCrepeConfig(BenchmarkConfig):
    """Which categories of SugarCrepe, and where they are."""

    format: Literal["sugar_crepe"]
    """Names SugarCrepe."""
    dir: Path = Path("data")
    """Folder with one JSON file per category."""
    images: str = "val2017"
    """Folder of COCO's val2017 in `data.dir`, or `s3://bucket/prefix`."""
    categories: Annotated[tuple[Category, ...], Field(min_length=1)] = tuple(CATEGORIES)
    """Which to measure."""
    positive: Literal["first", "second"] = "first"
    """Place of the true caption before the false one; results must not depend on it."""

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        groups = {
            name: tuple(one for one in self.categories if one in members)
            for name, members in GROUPS.items()
        }
        return Facts(
            name="SugarCrepe",
            split="all",
            source=SOURCE,
            direction="image -> text",
            counts={name: CATEGORIES[name] for name in self.categories},
            headline={EVERY_KIND: ("hit@1",)},
            groups={name: kinds for name, kinds in groups.items() if kinds},
            is_published=self.expected is None,
            published_groups=tuple(n for n, kinds in groups.items() if {*kinds} == {*GROUPS[n]}),
        )

    def _file(self, folder: Path, category: str) -> Path:
        return folder / self.dir / f"{category}.json"

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        return require_files([self._file(folder, name) for name in self.categories], SOURCE)

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        place = ImagePlace(folder, self.images)
        gallery: list[Entry] = []
        queries: list[Entry] = []
        candidates: dict[str, list[str]] = {}
        relevance: list[tuple[str, str]] = []
        for category in self.categories:
            path = self._file(folder, category)
            for number, record in read_json(path, dict).items():
                where, name = f"{path}: {number!r}", f"{category}-{number}"
                uri = place.uri(value_of(record, "filename", str, where), where)
                true, false = (text_of(record, n, where) for n in ("caption", "negative_caption"))
                if true == false:
                    raise DataError(f"{where}: caption and negative_caption are the same")
                pair = [Entry(f"{name}-true", true), Entry(f"{name}-false", false)]
                gallery += pair if self.positive == "first" else pair[::-1]
                queries.append(Entry(name, uri=uri, kind=category))
                candidates[name] = [entry.id for entry in pair]
                relevance.append((name, pair[0].id))
        counts: dict[str, int] = dict.fromkeys(self.categories, 0)
        for query in queries:
            counts[query.kind or ""] += 1
        return Tables(gallery, queries, relevance, folder / self.dir, counts, candidates)
