"""What a recipe names, loaded: a baseline never touches the backbone that others share."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.evaluate import embed_part
from pipelines.loading import backbone_of, encoder_of, scoring_backbone, untrained_adapter
from pipelines.recipe import Recipe
from slq.artifacts import save_adapter
from slq.encoder import Encoder
from slq.schema import Item
from tests.integration.runs import changed

ITEMS = [Item(text="two foxes left of a pencil"), Item(text="a bee")]


def with_lora(recipe: Recipe) -> Recipe:
    """A run whose adapter is LoRA with values that move the embedding."""
    recipe = changed(recipe, adapter={"method": "lora"})
    backbone = backbone_of(recipe)
    tuned = untrained_adapter(recipe, backbone)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if value.requires_grad and "lora_B" in name:
                value.fill_(0.1)
    recipe.storage.dir.mkdir(parents=True)
    save_adapter(recipe.storage.adapter, backbone, tuned)
    return recipe


def test_zero_shot_systems_are_measured_on_the_backbone_as_it_came(tiny_run: Recipe) -> None:
    recipe = with_lora(tiny_run)
    vectors = embed_part(recipe.model_dump_json(), ITEMS)
    zero_shot = Encoder(backbone_of(recipe)).encode(ITEMS)
    np.testing.assert_allclose(vectors["last_token"], zero_shot, atol=1e-6)
    assert np.abs(vectors["slq"] - zero_shot).max() > 1e-2
    np.testing.assert_allclose(vectors["slq"], encoder_of(recipe).encode(ITEMS), atol=1e-6)


def test_the_fine_stage_scores_with_frozen_weights(tiny_run: Recipe, tmp_path: Path) -> None:
    recipe = with_lora(tiny_run)
    encoder = encoder_of(recipe)
    assert (
        scoring_backbone(recipe, encoder).weights_sha256() == backbone_of(recipe).weights_sha256()
    )
    plain = Encoder(backbone_of(recipe))
    assert scoring_backbone(recipe, plain) is plain.backbone


PASSES = """
import resource
from pipelines.loading import keep_freed_memory
from slq.encoder import Encoder
from slq.backbones import load_backbone
if {kept}:
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

encoder = Encoder(load_backbone())
texts = ["two red foxes left of a grey castle, purple background"] * 64
for _ in range(2):
    encoder.encode(texts)
before = faults()
for _ in range(5):
    encoder.encode(texts)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults of glibc")
def test_memory_that_a_pass_frees_serves_the_next_one() -> None:
    found = {
        kept: int(
            subprocess.run(
                [sys.executable, "-c", PASSES.format(kept=kept)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
        )
        for kept in (False, True)
    }
    assert found[True] < 2000  # of 5 passes; nearly no page is asked for again
    assert found[False] > 10 * found[True]
