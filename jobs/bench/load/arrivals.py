"""When requests come: a Poisson process whose rate may change, so that nobody waits for the answer before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of time with one rate.

    Attributes:
        seconds: Its length.
        rate: Expected requests per second.
    """

    seconds: float
    rate: float


def poisson(pieces: Sequence[Piece], rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times, (n,) float64 seconds after the start, ascending.

    In each piece a Poisson count of uniform times, which is a Poisson process.
    """
    found, began = [np.zeros(0)], 0.0
    for piece in pieces:
        count = rng.poisson(piece.seconds * piece.rate)
        found.append(began + np.sort(rng.uniform(0, piece.seconds, count)))
        began += piece.seconds
    return np.concatenate(found)


def noisy(
    level: float, *, seconds: float, every_s: float, share: float, rng: np.random.Generator
) -> list[Piece]:
    """A level that jumps about itself.

    Args:
        level: Requests per second.
        seconds: In all.
        every_s: How long each rate holds.
        share: Largest distance from the level, as a share of it; each rate is drawn evenly within.
        rng: Draws them.
    """
    whole, rest = divmod(seconds, every_s)
    lengths = [every_s] * int(whole) + ([rest] if rest else [])
    factors = 1 + rng.uniform(-share, share, len(lengths))
    return [
        Piece(length, level * float(factor))
        for length, factor in zip(lengths, factors, strict=True)
    ]


def rate_at(pieces: Sequence[Piece], seconds: float) -> float:
    """The rate at a time after the start; 0 after the end."""
    for piece in pieces:
        if seconds < piece.seconds:
            return piece.rate
        seconds -= piece.seconds
    return 0.0
