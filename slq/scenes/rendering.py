"""Draws a scene: sprites on a plain background, with jitter, deterministic for a given generator."""

import io
import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from slq.scenes.layout import BACKGROUNDS, Entity, Scene
from slq.scenes.sprites import Sprite

CANVAS = 96  # pixels, both sides
_SIZE_SHARE = {
    "small": (0.36, 0.44),
    None: (0.66, 0.78),
    "big": (0.94, 1.0),
}  # of the cell's shorter side
_LARGEST = 48  # pixels; a lone object would otherwise fill the picture
_BACKGROUND_JITTER = 8  # colour steps

Box = tuple[int, int, int, int]  # left, top, right, bottom


def cells(scene: Scene) -> list[Box]:
    """The part of the canvas that belongs to each entity, in their order."""
    half = CANVAS // 2
    if scene.relation is None:
        return [(0, 0, CANVAS, CANVAS)]
    if len(scene.entities) == 2:
        if scene.relation == "left_of":
            return [(0, 0, half, CANVAS), (half, 0, CANVAS, CANVAS)]
        return [(0, 0, CANVAS, half), (0, half, CANVAS, CANVAS)]
    near, far = (half, 0) if scene.third_first else (0, half)
    if scene.relation == "left_of":
        return [
            (0, near, half, near + half),
            (half, near, CANVAS, near + half),
            (0, far, CANVAS, far + half),
        ]
    return [
        (near, 0, near + half, half),
        (near, half, near + half, CANVAS),
        (far, 0, far + half, CANVAS),
    ]


def render(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> NDArray[np.uint8]:
    """The scene as (CANVAS, CANVAS, 3) uint8 RGB."""
    colour, placements = _composition(scene, rng)
    canvas = np.tile(np.clip(colour, 0, 255) / 255.0, (CANVAS, CANVAS, 1)).astype(np.float32)
    for number, left, top, size in placements:
        picture = sprites[scene.entities[number].sprite_id].rgba(size)
        patch = canvas[top : top + size, left : left + size]
        patch *= 1.0 - picture[..., 3:]
        patch += picture[..., :3]
    pixels: NDArray[np.uint8] = np.rint(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels


def coverage(scene: Scene, rng: Generator, grid: int) -> NDArray[np.int64]:
    """Which entity covers each cell of the picture that `render` draws from an equal generator.

    Args:
        scene: What is drawn.
        rng: In the state that `render` was given.
        grid: Cells along one side.

    Returns:
        (grid, grid) int64 positions in `scene.entities`; -1 where a sprite's square takes less than half the cell.
    """
    _, placements = _composition(scene, rng)
    edges = np.arange(grid + 1) * (CANVAS / grid)
    cover = np.full((grid, grid), -1, dtype=np.int64)
    for number, left, top, size in placements:
        across = np.minimum(edges[1:], left + size) - np.maximum(edges[:-1], left)
        down = np.minimum(edges[1:], top + size) - np.maximum(edges[:-1], top)
        area = np.clip(down, 0, None)[:, None] * np.clip(across, 0, None)[None]
        cover[area >= 0.5 * (CANVAS / grid) ** 2] = number
    return cover


def _composition(
    scene: Scene, rng: Generator
) -> tuple[NDArray[np.float32], list[tuple[int, int, int, int]]]:
    """The background colour, RGB about 0..255, and (entity, left, top, size) of each sprite to draw."""
    colour = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    colour += rng.integers(-_BACKGROUND_JITTER, _BACKGROUND_JITTER + 1, size=3)
    placements = [
        (number, *placement)
        for number, (entity, box) in enumerate(zip(scene.entities, cells(scene), strict=True))
        for placement in _placements(entity, box, rng)
    ]
    return colour, placements


def render_png(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> bytes:
    """The scene as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene, sprites, rng)).save(buffer, format="PNG")
    return buffer.getvalue()


def _placements(entity: Entity, box: Box, rng: Generator) -> list[tuple[int, int, int]]:
    """(left, top, size) of each copy: grid slots of the cell, jittered inside their slot."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    columns, rows = _grid(entity.count, width, height, rng)
    slot_width, slot_height = width // columns, height // rows
    slots = rng.permutation(columns * rows)[: entity.count]
    placements = []
    for slot in slots:
        row, column = divmod(int(slot), columns)
        size = _sprite_size(entity, min(slot_width, slot_height), rng)
        placements.append(
            (
                left + column * slot_width + int(rng.integers(0, slot_width - size + 1)),
                top + row * slot_height + int(rng.integers(0, slot_height - size + 1)),
                size,
            )
        )
    return placements


def _grid(count: int, width: int, height: int, rng: Generator) -> tuple[int, int]:
    """(columns, rows) of the grid with the largest square slots; equally good ones are drawn from."""
    options = [(columns, math.ceil(count / columns)) for columns in range(1, count + 1)]
    best = max(min(width // columns, height // rows) for columns, rows in options)
    good = [grid for grid in options if min(width // grid[0], height // grid[1]) == best]
    return good[int(rng.integers(len(good)))]


def _sprite_size(entity: Entity, slot: int, rng: Generator) -> int:
    low, high = _SIZE_SHARE[entity.size]
    if entity.count > 1:
        low, high = 0.8, 0.95
    return int(min(slot, _LARGEST) * rng.uniform(low, high))
