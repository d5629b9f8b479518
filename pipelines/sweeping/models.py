"""What a task of a sweep loads once for its process."""

from functools import cache

from pipelines.loading import encoder_of, reranker_of, scoring_backbone, use_processors
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.encoder import Encoder
from slq.reranker import Reranker


@cache
def loaded(recipe_json: str) -> tuple[Recipe, Encoder]:
    """The recipe and its encoder.

    Raises:
        ArtifactMismatchError: The recipe's backbone with the adapter is another space than the adapter's.
    """
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.eval.num_threads)
    encoder = encoder_of(recipe)
    require_same_fingerprint(
        load_adapter_config(recipe.storage.adapter).fingerprint,
        encoder.fingerprint,
        expected_in=f"adapter {recipe.storage.adapter}",
        found_in="the recipe's backbone with it",
        remedy="sweep with the backbone section that it was trained with",
    )
    return recipe, encoder


@cache
def reranker(recipe_json: str) -> Reranker:
    """The fine stage, on the same backbone."""
    recipe, encoder = loaded(recipe_json)
    return reranker_of(recipe, scoring_backbone(recipe, encoder))
