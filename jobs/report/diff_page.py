"""The page of two runs' differences: one HTML file that works without a network, a server or a build step."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jobs.diffing import left_out
from jobs.report import template
from jobs.report.settings import JOBS
from jobs.report.style import data_uri
from jobs.report.tables import p_text
from pipelines.corpus import Record
from pipelines.difference import ALL, Difference, Place, items_of, summary, tags_of
from pipelines.recipe import Recipe
from slq.differences import Change
from slq.errors import MediaError
from slq.media import decode_image

SHOWN = 5
"""Results of each system that a query is shown with."""
_WANTED = 2
_PIXELS = 160
_QUALITY = 82


@dataclass(frozen=True, slots=True)
class Card:
    """An item on the page.

    Attributes:
        item_id: Of the corpus.
        source: Its thumbnail as a data URI; empty where it has none that can be read.
        text: Its caption; empty where it has none.
    """

    item_id: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """One place of a ranking."""

    rank: int
    card: Card
    place: Place
    right: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A query with both rankings.

    Attributes:
        change: Its ranks.
        text: The query's; empty where it is an image.
        source: Thumbnail of a query that is an image.
        tags: Its kinds.
        wanted: Some of its relevant items.
        rankings: Of both systems.
    """

    change: Change
    text: str
    source: str
    tags: list[str]
    wanted: list[Card]
    rankings: tuple[list[Shown], list[Shown]]


def write_diff(
    recipe: Recipe, found: Difference, names: tuple[str, str], path: Path, *, limit: int
) -> Path:
    """Write the page; nothing in ids, texts or names of the data is ever read as markup.

    Args:
        recipe: Names the corpus.
        found: As of `pipelines.difference.compare_runs`.
        names: Of both systems.
        path: The HTML file.
        limit: Queries that are shown of those won, and of those lost.

    Raises:
        DataError: An item of a run is not in the corpus.
    """
    chosen = shown_changes(found, limit)
    cards = _cards(recipe, found, chosen)
    entries = [_entry(found, change, cards) for change in chosen]
    told = summary(found)
    script = (JOBS / "templates" / "diff.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = template("diff.html.j2").render(
        names=names,
        told=told,
        whole=told[ALL],
        p_text=p_text,
        left_out=left_out(found.left_out, names),
        entries=entries,
        tags=_tag_counts(entries),
        limit=limit,
        depth=max(max(change.depths) for change in found.changes),
        script=script,
        script_digest=digest,
    )
    path.write_text(page, encoding="utf-8")
    return path


def shown_changes(found: Difference, limit: int) -> list[Change]:
    """Those won and those lost that changed most, so many of each, in the order of the change."""
    left = {"won": limit, "lost": limit, "same": 0}
    chosen = []
    for change in found.changes:
        if left[change.outcome]:
            left[change.outcome] -= 1
            chosen.append(change)
    return chosen


def _wanted(found: Difference, change: Change) -> list[str]:
    return sorted(found.relevant[change.query_id])[:_WANTED]


def _cards(recipe: Recipe, found: Difference, chosen: Sequence[Change]) -> dict[str, Card]:
    """Every item that is shown, with its thumbnail made once."""
    wanted: set[str] = set()
    for change in chosen:
        wanted |= set(_wanted(found, change))
        for run in (found.first, found.second):
            wanted |= {place.item_id for place in run[change.query_id][:SHOWN]}
    records = items_of(recipe, wanted) if wanted else {}
    return {name: _card(record) for name, record in records.items()}


def _card(record: Record) -> Card:
    return Card(record.id, _source(record), record.text or "")


def _source(record: Record) -> str:
    """A thumbnail as a data URI; empty where there is no image, or none that can be read."""
    if record.image is None:
        return ""
    try:
        image = decode_image(record.image)
    except MediaError:
        return ""
    image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=_QUALITY)
    return data_uri(buffer.getvalue(), "image/webp")


def _entry(found: Difference, change: Change, cards: Mapping[str, Card]) -> Entry:
    query = found.queries[change.query_id]
    relevant = found.relevant[change.query_id]
    first, second = (
        [
            Shown(rank, cards[place.item_id], place, place.item_id in relevant)
            for rank, place in enumerate(run[change.query_id][:SHOWN], start=1)
        ]
        for run in (found.first, found.second)
    )
    wanted = [cards[name] for name in _wanted(found, change)]
    text, source = query.text or "", _source(query)
    return Entry(change, text, source, tags_of(query), wanted, (first, second))


def _tag_counts(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for entry in entries:
        for tag in entry.tags:
            counts[tag] = counts.get(tag, 0) + 1
    return sorted(counts.items())
