"""The models of a run, with a note of every item that is prepared and of every one that is encoded.

`report.json` counts what arrived at the driver. Work that a killed worker had done, and another did again, is seen
only here. `python -m jobs.bench.chaos.witness RECIPE --set KEY=VALUE` is `slq embed` with these models.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.bench.chaos.notes import ENCODED, PREPARED, note
from pipelines.embedding import models
from pipelines.embedding.flow import Flow
from pipelines.recipe import Recipe, load_recipe
from slq.backbones.prompting import Prompt
from slq.prefix import Prefix
from slq.schema import Item

WITNESS = "jobs.bench.chaos.witness"
"""This module as a command and as `Flow.models`."""


class _Builder:
    def __init__(self, recipe: Recipe) -> None:
        self._builder = models.builder(recipe)

    def tokenised(self, items: Sequence[Item]) -> list[Prompt]:
        note(PREPARED, len(items))
        return self._builder.tokenised(items)


class _Encoder:
    def __init__(self, encoder: Any) -> None:
        self.backbone = encoder.backbone
        self._encoder = encoder

    def encode_prefix(self, prefix: Prefix) -> Tensor:
        vectors: Tensor = self._encoder.encode_prefix(prefix)
        note(ENCODED, len(vectors))
        return vectors


def builder(recipe: Recipe) -> Any:
    """See `Flow.builder`."""
    return _Builder(recipe)


def encoders(flow: Flow) -> list[Any]:
    """See `Flow.encoders`."""
    return [_Encoder(encoder) for encoder in models.encoders(flow)]


def main(arguments: list[str]) -> None:
    """Embed as `slq embed RECIPE --set KEY=VALUE` does."""
    from jobs.console import connected
    from pipelines.embed import embed

    recipe, _, override = arguments
    connected(load_recipe(Path(recipe), [override]), partial(embed, models=WITNESS))


if __name__ == "__main__":
    main(sys.argv[1:])
