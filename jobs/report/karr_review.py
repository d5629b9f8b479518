"""The review sheet: pages that hold everything an annotator needs, and save decisions as CSV."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.report import template
from jobs.report.style import data_uri, thumbnail
from pipelines.fetching import fetch_images
from pipelines.karr.outcome import finished_rows
from pipelines.karr.review import COLUMNS
from pipelines.recipe import Recipe
from slq.karr.categories import CATEGORIES

Row = dict[str, Any]


def write_review_pages(recipe: Recipe, folder: Path) -> list[Path]:
    """Write `review-001.html` and so on, one file each, and remove pages of an earlier run that are too many.

    Args:
        recipe: Of a finished run.
        folder: Beside its `review.csv`.
    """
    rows = [row for row in finished_rows(recipe) if row["reason"] is None]
    size = recipe.karr.review.page_rows
    starts = range(0, len(rows), size)
    pages = []
    for number, start in enumerate(starts, 1):
        page = folder / f"review-{number:03d}.html"
        text = review_page(
            list(_shown(rows[start : start + size], recipe.storage.retry_s)),
            title=f"candidates {start + 1} to {min(start + size, len(rows))} of {len(rows)}",
            key=f"{folder.resolve()} {number}",
        )
        partial = page.with_name(f".{page.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(page)
        pages.append(page)
    for stale in set(folder.glob("review-*.html")) - set(pages):
        stale.unlink()
    return pages


def review_page(rows: Sequence[Row], *, title: str, key: str) -> str:
    """One page: images, captions with the clue marked, and fields for decisions.

    Args:
        rows: With `image`, a data URI, and the caption in three parts, `before`, `clue` and `after`.
        title: What it shows.
        key: Under which the browser keeps what is not saved yet.
    """
    page = template("karr_review.html.j2")
    return page.render(rows=rows, title=title, key=key, columns=list(COLUMNS))


def _shown(rows: Sequence[Row], retry_s: float) -> Iterator[Row]:
    images = fetch_images(list(dict.fromkeys(row["uri"] for row in rows)), retry_s)
    for row in rows:
        data = images[row["uri"]]
        before, clue, after = _parts(row["caption"], row["clue"])
        yield {
            "id": row["source_id"],
            "image": data_uri(thumbnail(data), "image/png") if isinstance(data, bytes) else "",
            "original": row["original"],
            "target": row["target"],
            "caption": row["caption"],
            "before": before,
            "clue": clue,
            "after": after,
            "category": row["category"],
            "category_title": CATEGORIES[row["category"]].title,
            "clue_type": row["clue_type"],
            "votes": [vote for vote in row["votes"] if vote["accept"] is not None],
        }


def _parts(caption: str, clue: str) -> tuple[str, str, str]:
    """A caption as what stands before the clue, the clue, and what stands after it."""
    start = caption.lower().find(clue.lower())
    if start < 0 or len(caption.lower()) != len(caption):
        return caption, "", ""
    return caption[:start], caption[start : start + len(clue)], caption[start + len(clue) :]
