"""The models of a run, and what is checked of their adapters before anything starts."""

from pipelines.commits import new_attempt
from pipelines.corpus import corpus_of
from pipelines.embedding.flow import MODELS, Flow
from pipelines.loading import backbone_of, encoder_of
from pipelines.recipe import Recipe
from slq.artifacts import (
    AdapterConfig,
    load_adapter,
    load_adapter_config,
    require_same_fingerprint,
)
from slq.backbones.prompting import PromptBuilder
from slq.encoder import Encoder
from slq.errors import ArtifactMismatchError, ConfigError


def builder(recipe: Recipe) -> PromptBuilder:
    """The recipe's backbone without weights."""
    return backbone_of(recipe, weights=False)


def encoders(flow: Flow) -> list[Encoder]:
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


def new_flow(recipe: Recipe, configs: list[AdapterConfig], models: str = MODELS) -> Flow:
    """A run of its own.

    Args:
        recipe: The resolved recipe.
        configs: As `adapter_configs` gives them.
        models: The module that gives them.

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
