"""The picture of a pilot: images as heads of columns, texts as heads of rows, a score for each method."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from jobs.piloting import NAMES, mark, score
from jobs.report.style import COLOURS, INK, LINE, MUTED, RIGHT

_WRONG_COLOUR = "#a8430b"
_COLUMN, _HEAD, _TEXT, _METHOD = 1.9, 1.75, 3.0, 1.75  # inches
_LINE, _PAD, _FOOT = 0.3, 0.34, 0.45
_TEXT_CHARS = 30


def write_pilot_plot(
    result: Mapping[str, Any], images: Sequence[Image.Image], target: Path
) -> Path:
    """Draw a pilot into a PNG; the same scores always give the same bytes."""
    pilot_figure(result, images).savefig(target, dpi=110, metadata={"Software": None})
    return target


def pilot_figure(result: Mapping[str, Any], images: Sequence[Image.Image]) -> Figure:
    """A table with pictures; the best image of each text and method is ticked, or crossed where it is wrong.

    Args:
        result: As of `pipelines.pilot.pilot`.
        images: In the order of its columns.
    """
    texts, methods = result["texts"], result["methods"]
    block = _LINE * max(len(methods), 2) + _PAD
    width = _TEXT + _METHOD + _COLUMN * len(images)
    height = _HEAD + block * len(texts) + _FOOT
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches from the upper left corner
    axes.axis("off")
    for number, (image, name) in enumerate(zip(images, result["images"], strict=True)):
        left = _TEXT + _METHOD + _COLUMN * number
        _head(figure, axes, image, name, left)
    for number, text in enumerate(texts):
        top = _HEAD + block * number
        axes.plot((0.15, width - 0.15), (top, top), color=LINE, linewidth=1)
        _row_head(axes, text, top + block / 2)
        for line, (key, method) in enumerate(methods.items()):
            y = top + _PAD / 2 + _LINE * (line + 0.5)
            axes.plot(_TEXT, y, "o", color=COLOURS[key], markersize=6)
            axes.text(_TEXT + 0.14, y, NAMES[key], va="center", fontsize=10, color=INK)
            for column in range(len(images)):
                x = _TEXT + _METHOD + _COLUMN * (column + 0.5)
                _cell(axes, (x, y), score(method, number, column), mark(method, number, column))
    axes.text(
        *(0.15, height - _FOOT / 2),
        f"cosine; {result['backbone']['model']}; untrained latents: mean and standard deviation of "
        f"{len(result['seeds'])} draws",
        va="center",
        fontsize=8.5,
        color=MUTED,
    )
    return figure


def _head(figure: Figure, axes: Axes, image: Image.Image, name: str, left: float) -> None:
    width, height = figure.get_size_inches()
    side = 1.25
    place = (left + (_COLUMN - side) / 2, height - 0.15 - side)
    box = (place[0] / width, place[1] / height, side / width, side / height)
    frame = figure.add_axes(box)
    frame.imshow(np.asarray(image))
    frame.set_xticks([])
    frame.set_yticks([])
    for spine in frame.spines.values():
        spine.set_color(LINE)
    title = textwrap.shorten(name, 20, placeholder="\N{HORIZONTAL ELLIPSIS}")
    axes.text(
        *(left + _COLUMN / 2, _HEAD - 0.17),
        title,
        ha="center",
        va="center",
        fontsize=9,
        color=MUTED,
        parse_math=False,
    )


def _row_head(axes: Axes, text: Mapping[str, Any], middle: float) -> None:
    words = "\n".join(textwrap.wrap(text["text"], _TEXT_CHARS, max_lines=2))
    style: dict[str, Any] = {"fontsize": 11, "color": INK, "parse_math": False}
    if text["level"]:
        axes.text(0.2, middle - 0.24, text["level"], va="center", fontsize=8.5, color=MUTED)
        middle += 0.12
    axes.text(0.2, middle, words, va="center", **style)


def _cell(axes: Axes, place: tuple[float, float], value: str, sign: str) -> None:
    colour = {"": INK, "\N{CHECK MARK}": RIGHT, "\N{MULTIPLICATION SIGN}": _WRONG_COLOUR}.get(
        sign, INK
    )
    weight = "bold" if sign else "normal"
    shown = f"{value}  {sign}" if sign else value
    axes.text(*place, shown, ha="center", va="center", fontsize=10, color=colour, fontweight=weight)
