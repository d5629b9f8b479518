"""The work of the tasks: a backbone is loaded, an adapter into it, and the model is asked, or compared with itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.loading import backbone_of, use_processors
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter, load_adapter_config
from slq.backbones import Backbone
from slq.benchmarks.answering import Answer, Respondent
from slq.benchmarks.questions import Question
from slq.encoder import Encoder
from slq.pretraining.config import PretrainConfig
from slq.pretraining.evaluation import accuracies_of
from slq.schema import Item

_PROBE_SIDES = ((96, 64), (64, 128))  # pixels


def scene_skills(recipe_json: str, adapter: Path | None, num_scenes: int) -> dict[str, Any]:
    """Accuracies on scenes, and the digest of the weights; on the CPU in float32.

    Args:
        recipe_json: The resolved recipe.
        adapter: Loaded first; None leaves the backbone as it is.
        num_scenes: Held-out ones; 0 asks nothing but the digest.
    """
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.eval.num_threads)
    section = recipe.backbone.model_copy(update={"device": "cpu", "dtype": "float32"})
    backbone = backbone_of(recipe.model_copy(update={"backbone": section}))
    before = backbone.weights_sha256()
    if adapter is not None:
        load_adapter(adapter, backbone)
    after = backbone.weights_sha256()
    found = accuracies_of(backbone, PretrainConfig(), num_scenes=num_scenes) if num_scenes else {}
    return {**found, "weights_sha256": after, "weights_identical": before == after}


def answers_to(
    recipe_json: str, adapter: Path | None, name: str, questions: Sequence[Question]
) -> list[Answer]:
    """Answers to questions of one set.

    Args:
        recipe_json: The resolved recipe.
        adapter: As of `scene_skills`.
        name: Of the set in `retention`.
        questions: Some of it.
    """
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.retention.num_threads)
    backbone = backbone_of(recipe)
    if adapter is not None:
        load_adapter(adapter, backbone)
    respondent = Respondent(backbone, batch_size=recipe.retention.batch_size)
    return respondent.answer(questions, recipe.retention.sets[name])


def identity_of(recipe_json: str, adapter: Path) -> dict[str, Any]:
    """Whether a backbone with an adapter loaded, and after embedding with it, is bit for bit what it was before.

    Returns:
        `method` of the adapter, `weights_sha256` before and with it, `weights_identical`, `logits_identical` over the
        whole vocabulary after prompts with and without an image, and `largest_logit_difference`.
    """
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.retention.num_threads)
    backbone = backbone_of(recipe)
    weights, logits = backbone.weights_sha256(), probe_logits(backbone)
    encoder = Encoder(backbone, load_adapter(adapter, backbone))
    loaded = probe_logits(backbone)
    encoder.encode_items(probe_items())
    after = probe_logits(backbone)
    changed = backbone.weights_sha256()
    return {
        "method": load_adapter_config(adapter).slq_type,
        "weights_sha256_before": weights,
        "weights_sha256": changed,
        "weights_identical": weights == changed,
        "logits_identical": torch.equal(logits, loaded) and torch.equal(logits, after),
        "largest_logit_difference": float(
            max((logits - loaded).abs().max(), (logits - after).abs().max())
        ),
    }


@torch.no_grad()
def probe_logits(backbone: Backbone) -> Tensor:
    """(probes, vocab) logits of what follows each probe."""
    return backbone.token_logits(backbone.prefix(backbone.prompts(probe_items())).last_hidden)


def probe_items() -> list[Item]:
    """Fixed prompts: a text, an image, and both."""
    rng = np.random.default_rng(0)
    first, second = (
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in _PROBE_SIDES
    )
    question = "Is there a dog to the left of the cat? Answer yes or no."
    return [Item(text=question), Item(image=first), Item(text=question, image=second)]
