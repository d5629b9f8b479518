"""What every stage of a run knows: plain settings that travel to the workers, and what they load by them, once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa

from pipelines.commits import new_attempt
from pipelines.corpus import Corpus, Plan, read_plan
from pipelines.ledger import Ledger
from pipelines.loading import backbone_of, corpus_of, encoder_of
from pipelines.recipe import Recipe
from slq.arrow import embedding_schema
from slq.artifacts import (
    AdapterConfig,
    load_adapter,
    load_adapter_config,
    require_same_fingerprint,
)
from slq.backbones.prompting import PromptBuilder
from slq.encoder import Encoder
from slq.errors import ArtifactMismatchError, ConfigError
from slq.quantization import Calibration

PLAN = "plan.parquet"


@dataclass(frozen=True)
class Models:
    """Where the stages get their models from; a benchmark may put others in their place.

    Attributes:
        builder: Gives what builds prompts, without any weights.
        encoders: Gives the encoders of a pass, the recipe's own adapter's first; they share one backbone.
    """

    builder: Callable[[Recipe], PromptBuilder]
    encoders: Callable[["Flow"], list[Encoder]]


@dataclass(frozen=True)
class Flow:
    """One run of embedding, as its workers see it. Models and files are opened by it in each worker, never shipped.

    Attributes:
        recipe: The resolved recipe.
        run: Names this driver's pieces and attempts.
        dimension: Length of the stored vectors.
        fingerprints: Of the recipe's own adapter and of the further ones, in the order of `embed.adapters`.
        user_schema: The user's own columns, serialised.
        models: Where models come from.
        calibration: Ranges of int8 and binary vectors, as JSON; None where they are not asked for.
    """

    recipe: Recipe
    run: str
    dimension: int
    fingerprints: tuple[str, ...]
    user_schema: bytes
    models: Models
    calibration: dict[str, Any] | None = None

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

    def builder(self) -> PromptBuilder:
        """What builds prompts; kept for the next task of this process."""
        return _kept_builder(self.models.builder, self.recipe.model_dump_json())

    def encoders(self) -> list[Encoder]:
        """The encoders of a pass, newly loaded."""
        return self.models.encoders(self)


@lru_cache(maxsize=1)
def _kept_builder(load: Callable[[Recipe], PromptBuilder], recipe_json: str) -> PromptBuilder:
    return load(Recipe.model_validate_json(recipe_json))


def bare_backbone(recipe: Recipe) -> PromptBuilder:
    """The recipe's backbone without weights."""
    return backbone_of(recipe, weights=False)


def encoders_of(flow: Flow) -> list[Encoder]:
    """The encoders of the recipe's own adapter and of `embed.adapters`, over one backbone.

    Raises:
        ArtifactMismatchError: One is not what the data set is made with.
    """
    recipe = flow.recipe
    first = encoder_of(recipe)
    others = recipe.embed.adapters.values()
    found = [
        first,
        *(Encoder(first.backbone, load_adapter(path, first.backbone)) for path in others),
    ]
    folders = (recipe.storage.adapter, *others)
    for folder, encoder, expected in zip(folders, found, flow.fingerprints, strict=True):
        require_same_fingerprint(
            expected,
            encoder.fingerprint,
            expected_in=f"adapter {folder}",
            found_in="the encoder of this recipe",
            remedy="use the backbone name, revision and dtype that the adapter was trained with",
        )
    return found


REAL = Models(bare_backbone, encoders_of)


def new_flow(recipe: Recipe, configs: list[AdapterConfig], models: Models = REAL) -> Flow:
    """A run of its own.

    Args:
        recipe: The resolved recipe.
        configs: As `adapter_configs` gives them.
        models: Where models come from.

    Raises:
        DataError: The corpus cannot be read.
    """
    return Flow(
        recipe=recipe,
        run=new_attempt(),
        dimension=stored_dimension(recipe, configs[0].hidden_size),
        fingerprints=tuple(one.fingerprint for one in configs),
        user_schema=corpus_of(recipe).user_schema().serialize().to_pybytes(),
        models=models,
    )


def adapter_configs(recipe: Recipe) -> list[AdapterConfig]:
    """Of the recipe's own adapter and of `embed.adapters`, checked as far as they can be without weights.

    Raises:
        ArtifactError: One is missing.
        ArtifactMismatchError: They cannot share a pass: one changes the backbone, or has other prompts.
    """
    folders = (recipe.storage.adapter, *recipe.embed.adapters.values())
    configs = [load_adapter_config(folder) for folder in folders]
    first = configs[0]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        shared = (
            "base_model_name_or_path",
            "revision",
            "prompt",
            "max_text_tokens",
            "image_limits",
        )
        other = [name for name in shared if getattr(config, name) != getattr(first, name)]
        if first.slq_type != "SLQ" or config.slq_type != "SLQ" or other:
            reason = (
                f"they differ in {', '.join(other)}"
                if other
                else "LoRA and full change the backbone"
            )
            raise ArtifactMismatchError(
                f"adapters {folders[0]} and {folder} cannot embed in one pass: {reason}; embed them into two data sets"
            )
    return configs


def stored_dimension(recipe: Recipe, hidden_size: int) -> int:
    """Length of the stored vectors.

    Raises:
        ConfigError: `embed.dimension` is longer than the adapter's vectors.
    """
    wanted = recipe.embed.dimension or hidden_size
    if wanted > hidden_size:
        raise ConfigError(
            f"embed.dimension is {wanted}, but the adapter's vectors have {hidden_size} values"
        )
    return wanted
