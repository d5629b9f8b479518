"""What every stage of a run knows: plain settings that travel to the workers, and what they load by them, once.

This module imports no model code: tasks that only write start in a fraction of the time.
"""

import importlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.corpus import Corpus, Plan, corpus_of, read_plan
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from slq.arrow import embedding_schema
from slq.quantization import Calibration

if TYPE_CHECKING:
    from slq.backbones.prompting import PromptBuilder
    from slq.encoder import Encoder

PLAN = "plan.parquet"
MODELS = "pipelines.embedding.models"
"""Where models come from."""


@dataclass(frozen=True)
class Flow:
    """One run of embedding, as its workers see it. Models and files are opened by it in each worker, never shipped.

    Attributes:
        recipe: The resolved recipe.
        run: Names this driver's pieces and attempts.
        dimension: Length of the stored vectors.
        fingerprints: Of the recipe's own adapter and of the further ones, in the order of `embed.adapters`.
        user_schema: The user's own columns, serialised.
        models: The module whose `builder` and `encoders` give the models; a benchmark may name another.
        calibration: Ranges of int8 and binary vectors, as JSON; None where they are not asked for.
        journal: Handle of the run's `Journal`.
    """

    recipe: Recipe
    run: str
    dimension: int
    fingerprints: tuple[str, ...]
    user_schema: bytes
    models: str = MODELS
    calibration: dict[str, Any] | None = None
    journal: Any = None

    @cached_property
    def user_fields(self) -> list[pa.Field]:
        """The user's own columns."""
        return list(pa.ipc.read_schema(pa.py_buffer(self.user_schema)))

    @cached_property
    def shard_schema(self) -> pa.Schema:
        """Columns of the data set."""
        section = self.recipe.embed
        return embedding_schema(
            self.dimension,
            self.user_fields,
            outputs=section.outputs,
            adapters=tuple(section.adapters),
        )

    @cached_property
    def ranges(self) -> Calibration | None:
        """The calibration as numbers."""
        return None if self.calibration is None else Calibration.from_json(self.calibration)

    def ledger(self) -> Ledger:
        """The data set's files."""
        return Ledger(self.recipe.storage.embeddings, self.recipe.storage.retry_s)

    def corpus(self) -> Corpus:
        """The input."""
        return corpus_of(self.recipe)

    def plan(self) -> Plan:
        """The shards."""
        return read_plan(self.ledger().store, PLAN)

    def builder(self) -> "PromptBuilder":
        """What builds prompts, without any weights; kept for the next task of this process."""
        return _kept_builder(self.models, self.recipe.model_dump_json())

    def encoders(self) -> "list[Encoder]":
        """The encoders of a pass, newly loaded, the recipe's own adapter's first; they share one backbone.

        Raises:
            ArtifactMismatchError: One is not what the data set is made with.
        """
        found: list[Encoder] = importlib.import_module(self.models).encoders(self)
        return found


@lru_cache(maxsize=1)
def _kept_builder(models: str, recipe_json: str) -> "PromptBuilder":
    recipe = Recipe.model_validate_json(recipe_json)
    builder: PromptBuilder = importlib.import_module(models).builder(recipe)
    return builder
