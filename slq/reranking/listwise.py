"""Candidates side by side: the model says which option it takes (spec: RetLLM section 2).

It is read off the options' names at one position, nothing is generated. A model prefers places, so every candidate
stands at every place once and its log-probabilities are averaged.
"""

from collections.abc import Iterator, Sequence
from string import ascii_uppercase

import torch
from torch import Tensor

from slq.errors import DataError
from slq.reranking.layout import Layout, Run, Words, described
from slq.schema import Item

NAMES = ascii_uppercase
"""Of the options: letters, as a number above 9 is two tokens in most vocabularies."""
_QUESTION = "Which candidate matches the query best? Answer with its letter."


def rotations(query: Item, candidates: Sequence[Item]) -> list[Layout]:
    """One turn for each cyclic shift: in turn r, candidate n stands at place (n - r) modulo their number.

    Raises:
        DataError: There are too few or too many candidates.
    """
    count = len(candidates)
    if not 2 <= count <= len(NAMES):
        raise DataError(
            f"{count} candidates cannot be compared side by side; give 2 to {len(NAMES)}, or score pairs"
        )
    return [
        Layout(query.image, tuple(_turn(query, [*candidates[r:], *candidates[:r]])))
        for r in range(count)
    ]


def _turn(query: Item, options: Sequence[Item]) -> Iterator[Run]:
    yield from described("Query", query, is_first=True)
    for name, option in zip(NAMES, options, strict=False):
        yield from described(name, option, is_first=False)
    yield Words(_QUESTION, trusted=True)


def averaged(said: Tensor) -> Tensor:
    """(n,) mean log-probability of each candidate.

    Args:
        said: (n, n) log-probabilities of the option at each place, a row for each shift of `rotations`.
    """
    count = len(said)
    candidate, shift = torch.arange(count)[:, None], torch.arange(count)[None, :]
    return said[shift, (candidate - shift) % count].mean(1)
