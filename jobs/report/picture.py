"""The README's picture: a few queries with their coarse and fine results."""

from pathlib import Path

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jobs.report.galleries import SHOWN, Example, Outcome, Shown, examples, read_runs
from jobs.report.style import INK, LINE, MUTED, RIGHT
from jobs.report.tables import signed
from jobs.results import read_results
from pipelines.recipe import Recipe
from slq.media import decode_image

_PICTURED: tuple[tuple[str, Outcome], ...] = (
    ("explicit hard", "corrected"),
    ("knowledge", "corrected"),
    ("explicit", "kept"),
    ("explicit hard", "missed"),
)
"""The same for the README's picture."""

_WIDTH, _TILE, _STEP, _ROW, _TOP = 1200, 96, 112, 178, 46
_LEFT, _MIDDLE = 24, 632
_OUTCOME_COLOURS: dict[Outcome, str] = {
    "corrected": RIGHT,
    "kept": MUTED,
    "spoiled": "#a8430b",
    "missed": "#a8430b",
    "found": RIGHT,
    "lost": "#a8430b",
}


def gallery_picture(recipe: Recipe, path: Path) -> Path | None:
    """Draw a few queries with their coarse and fine results as a PNG, 1200 pixels wide.

    Returns:
        `path`, or None where the run has nothing to show.
    """
    runs = read_runs(recipe, read_results(recipe)["systems"])
    if runs is None:
        return None
    shown = examples(recipe, runs, _PICTURED)
    picture = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(shown)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_LEFT, 16), f"coarse top {SHOWN}, by cosine", fill=MUTED, font=_font(15))
    if runs.fine:
        draw.text((_MIDDLE, 16), f"fine top {SHOWN}, by margin", fill=MUTED, font=_font(15))
    for n, example in enumerate(shown):
        top = _TOP + n * _ROW
        _draw_heading(draw, example, top=top)
        for left, ranking in ((_LEFT, example.coarse), (_MIDDLE, example.fine)):
            for place, result in enumerate(ranking.shown if ranking else []):
                _draw_result(picture, result, left=left + place * _STEP, top=top + 42)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
    return path


def _draw_heading(draw: ImageDraw.ImageDraw, example: Example, *, top: int) -> None:
    """A rule, the query on the left and its outcome on the right."""
    draw.line((_LEFT, top, _WIDTH - _LEFT, top), fill=LINE)
    label, small = example.label, _font(14)
    last = example.fine or example.coarse
    if not any(result.right for result in (*example.coarse.shown, *last.shown)):
        place = (
            f"below rank {last.depth}" if last.right_rank is None else f"at rank {last.right_rank}"
        )
        label += f", right one {place}"
    right = _WIDTH - _LEFT
    colour = _OUTCOME_COLOURS[example.outcome]
    draw.text((right, top + 13), label, fill=colour, font=small, anchor="ra")
    room = right - _LEFT - draw.textlength(label, font=small) - 24
    text, font = " ".join(example.text.split()), _font(17, bold=True)
    while draw.textlength(text, font=font) > room:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    draw.text((_LEFT, top + 10), text, fill=INK, font=font)


def _draw_result(picture: Image.Image, result: Shown, *, left: int, top: int) -> None:
    """A thumbnail with its score; a right one has a green frame and a check mark."""
    draw = ImageDraw.Draw(picture)
    if result.image is None:
        draw.rectangle((left, top, left + _TILE, top + _TILE), fill="#f2f4f7")
        draw.text((left + 6, top + 6), result.text[:14], fill=INK, font=_font(11))
    else:
        tile = ImageOps.pad(decode_image(result.image), (_TILE, _TILE), color="#f2f4f7")
        picture.paste(tile, (left, top))
    if result.right:
        draw.rectangle((left - 4, top - 4, left + _TILE + 3, top + _TILE + 3), None, RIGHT, 4)
        x, y = left + _TILE, top
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=RIGHT, outline="white", width=2)
        draw.line((x - 6, y, x - 2, y + 5, x + 6, y - 5), fill="white", width=3, joint="curve")
    score = f"{result.cosine:.3f}" if result.margin is None else signed(result.margin, 2)
    centre = (left + _TILE / 2, top + _TILE + 8)
    colour = RIGHT if result.right else MUTED
    draw.text(centre, score, fill=colour, font=_font(13, bold=result.right), anchor="ma")


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships, so that every machine draws the same picture."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / name, size)
