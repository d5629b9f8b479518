"""Our encoder under mteb: its figures of a small text-to-image task are ours; skipped where mteb is not installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slq.artifacts import save_adapter
from slq.backbones import load_backbone
from slq.encoder import Encoder
from slq.errors import DataError
from slq.latent_queries import LatentQueries
from slq.metrics import parse_metric, ranks_of_scores
from slq.mteb import MtebEncoder

NUM_ITEMS = 24
TEXTS = [
    f"{n} {thing}"
    for n in ("a", "two", "three")
    for thing in ("foxes", "apples", "robots", "pencils")
]
GRADES = np.random.default_rng(1).choice([0, 0, 0, 0, 0, 1, 2], (len(TEXTS), NUM_ITEMS))
GRADES[np.arange(len(TEXTS)), np.arange(len(TEXTS))] = 1
OURS = {
    "hit_rate_at_5": "hit@5", "ndcg_at_1": "ndcg@1", "ndcg_at_10": "ndcg@10", "map_at_10": "map@10",
    "recall_at_1": "recall@1", "recall_at_5": "recall@5", "recall_at_10": "recall@10", "precision_at_5": "precision@5",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_backbone("tiny"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (NUM_ITEMS, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((96, 96)) for one in pixels]


def task_of(images: list[Image.Image], category: str) -> Any:
    """A task of mteb in memory: `t2i` looks for images, `it2i` for images with images and texts."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class InMemory(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"SlqInMemory-{category}",
            description="A few random images",
            reference="https://example.org",
            dataset={"path": "NA", "revision": "NA"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=("2026-01-01", "2026-01-02"),
            dialect=[],
            domains=[],
            task_subtypes=[],
            license="cc-by-4.0",
            annotations_creators="derived",
            sample_creation="created",
            bibtex_citation="",
        )

        def load_data(self, **_: Any) -> None:
            queries: dict[str, list[Any]] = {
                "id": [f"q{n}" for n in range(len(TEXTS))],
                "text": TEXTS,
            }
            if category == "it2i":
                queries["image"] = images[: len(TEXTS)]
            corpus = {"id": [f"i{n}" for n in range(NUM_ITEMS)], "image": images}
            relevant = {
                f"q{q}": {f"i{i}": int(grade) for i, grade in enumerate(row) if grade}
                for q, row in enumerate(GRADES)
            }
            split = {
                "queries": Dataset.from_dict(queries),
                "corpus": Dataset.from_dict(corpus),
                "relevant_docs": relevant,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return InMemory()


@pytest.mark.parametrize("category", ["t2i", "it2i"])
def test_figures_of_mteb_are_ours(
    encoder: Encoder, images: list[Image.Image], category: str
) -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'slq[mteb]'")
    model = MtebEncoder("runs/mine/adapter", encoder=encoder)
    assert isinstance(model, mteb.EncoderProtocol)
    result = mteb.evaluate(
        model, task_of(images, category), cache=None, co2_tracker=False, show_progress_bar=False
    )
    (scores,) = result.task_results[0].scores["test"]
    asked = (
        TEXTS
        if category == "t2i"
        else [{"text": text, "image": image} for text, image in zip(TEXTS, images, strict=False)]
    )
    ranks = ranks_of_scores(encoder.encode(asked) @ encoder.encode(images).T, GRADES)
    assert (
        len(np.unique(encoder.encode(images), axis=0)) == NUM_ITEMS
    )  # no ties, which each breaks its own way
    for theirs, name in OURS.items():
        # mteb rounds to five places
        assert scores[theirs] == pytest.approx(parse_metric(name)(ranks).mean(), abs=5.1e-6), name
    assert 0 < scores["ndcg_at_10"] < 1
    assert result.model_name == "slq/adapter"
    assert result.model_revision == encoder.fingerprint


def test_batches_are_embedded_in_their_order(encoder: Encoder, images: list[Image.Image]) -> None:
    model = MtebEncoder("x", encoder=encoder)
    batches = [{"text": TEXTS[:5]}, {"text": TEXTS[5:]}]
    np.testing.assert_allclose(model.encode(batches), encoder.encode(TEXTS), atol=1e-5)
    both = [{"text": TEXTS[:3], "image": images[:3], "id": ["a", "b", "c"]}]
    wanted = encoder.encode(
        [{"text": text, "image": image} for text, image in zip(TEXTS, images[:3], strict=False)]
    )
    np.testing.assert_allclose(model.encode(both, batch_size=2), wanted, atol=1e-5)
    assert model.encode([]).shape == (0, encoder.dimension)


def test_similarities_are_cosines(encoder: Encoder) -> None:
    model = MtebEncoder("x", encoder=encoder)
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    wanted = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in second] for a in first]
    np.testing.assert_allclose(model.similarity(first, torch.tensor(second)), wanted, atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(first, second), np.diag(wanted), atol=1e-6)
    assert model.similarity(first[0], second).shape == (1, 3)


def test_batches_without_texts_and_images_are_refused(encoder: Encoder) -> None:
    with pytest.raises(
        DataError, match="a batch of mteb holds audio, id, and slq embeds texts and"
    ):
        MtebEncoder("x", encoder=encoder).encode([{"audio": [1], "id": ["a"]}])


def test_an_adapter_folder_is_loaded_by_its_path(tmp_path: Path, encoder: Encoder) -> None:
    latents = LatentQueries(2, encoder.backbone.hidden_size)
    save_adapter(tmp_path / "mine", encoder.backbone, latents)
    model = MtebEncoder(tmp_path / "mine", None, device="cpu", trust_remote_code=False)
    assert model.name == "mine"
    assert model.encoder.fingerprint == Encoder(encoder.backbone, latents).fingerprint
