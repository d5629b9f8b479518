"""What a recipe names, loaded: a baseline never touches the backbone that others share."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.benchmark import load_benchmark
from pipelines.evaluation_parts import embed_part, score_part
from pipelines.loading import (
    backbone_of,
    encoder_of,
    scorer_digest,
    scorer_of,
    scoring_backbone,
    untrained_adapter,
)
from pipelines.ranking import Scores, run_table
from pipelines.recipe import Recipe
from slq.artifacts import save_adapter
from slq.encoder import Encoder
from slq.reranker import Reranker
from slq.reranking.profiles import PROFILES
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


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_an_evaluation_orders_as_a_reranker_does_query_by_query(
    tiny_run: Recipe, profile: str
) -> None:
    recipe = changed(tiny_run, rerank={"profile": profile, "framing": None})
    whole = load_benchmark(recipe)
    few = replace(whole, queries=whole.queries[:6], relevant=whole.relevant[:6])
    coarse = np.random.default_rng(0).random(few.relevant.shape).astype(np.float32)
    best = np.argsort(-coarse, axis=1)[:, :5]
    readings = score_part(recipe.model_dump_json(), few.queries, few.items, best)
    scores = Scores(coarse).scored(best, readings, PROFILES[profile])
    rows = run_table(few, scores, depth=8).to_pylist()
    reranker = Reranker(backbone_of(recipe), profile=profile)
    for q, query in enumerate(few.queries):
        ranked = reranker.rank(query, few.items, coarse[q].tolist(), depth=5)[:8]
        told = rows[8 * q : 8 * (q + 1)]
        assert [row["item_id"] for row in told] == [few.items[one.index].id for one in ranked]
        for row, one in zip(told, ranked, strict=True):
            fine = one.fine_score
            expected = None if fine is None else pytest.approx(fine, abs=1e-4)
            assert row["fine_score"] == expected
    by_coarse = np.take_along_axis(coarse, best, axis=1)
    for q in range(len(few.queries)):
        assert [row["score"] for row in rows[8 * q : 8 * q + 5]] == by_coarse[q].tolist()


def test_a_scorer_is_named_by_the_question_that_it_asks_and_not_by_where_that_stands(
    tiny_run: Recipe,
) -> None:
    backbone = backbone_of(tiny_run, weights=False)

    def digest(profile: str, framing: str | None) -> str:
        recipe = changed(tiny_run, rerank={"profile": profile, "framing": framing})
        return scorer_digest(scorer_of(recipe, backbone))

    for name, profile in PROFILES.items():
        assert digest(name, None) == digest(name, profile.framing)
    assert digest("default", None) != digest("compat", None)  # they ask something else
    assert digest("default", "rate") == digest("compat", "rate")


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
