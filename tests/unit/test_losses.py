"""Symmetric InfoNCE against the formula written out in numpy."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slq.losses import info_nce


def unit_rows(rows: int, width: int, seed: int) -> NDArray[np.float64]:
    values = np.random.default_rng(seed).normal(size=(rows, width))
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def written_out(
    images: NDArray[np.float64], texts: NDArray[np.float64], temperature: float
) -> float:
    """-1/n sum log softmax of the pair, over the texts of an image and the images of a text."""
    n = len(images)
    image_to_text = text_to_image = 0.0
    for i in range(n):
        own = math.exp(float(images[i] @ texts[i]) / temperature)
        over_texts = sum(math.exp(float(images[i] @ texts[j]) / temperature) for j in range(n))
        over_images = sum(math.exp(float(images[j] @ texts[i]) / temperature) for j in range(n))
        image_to_text -= math.log(own / over_texts) / n
        text_to_image -= math.log(own / over_images) / n
    return (image_to_text + text_to_image) / 2


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.05, 0.07, 1.0])
def test_info_nce_equals_the_written_out_formula(rows: int, temperature: float) -> None:
    images, texts = unit_rows(rows, 5, 0), unit_rows(rows, 5, 1)
    ours = info_nce(
        torch.tensor(images), torch.tensor(texts), torch.tensor(temperature, dtype=torch.float64)
    )
    assert float(ours) == pytest.approx(
        written_out(images, texts, temperature), rel=1e-12, abs=1e-12
    )


def test_info_nce_is_symmetric_in_its_sides() -> None:
    images, texts = torch.tensor(unit_rows(6, 4, 0)), torch.tensor(unit_rows(6, 4, 1))
    temperature = torch.tensor(0.1, dtype=torch.float64)
    assert float(info_nce(images, texts, temperature)) == pytest.approx(
        float(info_nce(texts, images, temperature)), rel=1e-14
    )


def test_equal_vectors_cost_the_logarithm_of_the_batch() -> None:
    same = torch.ones(8, 3) / math.sqrt(3)
    assert float(info_nce(same, same, torch.tensor(0.07))) == pytest.approx(math.log(8), rel=1e-6)


def test_orthogonal_pairs_cost_almost_nothing_and_shuffled_pairs_much() -> None:
    vectors = torch.eye(6)
    assert float(info_nce(vectors, vectors, torch.tensor(0.05))) < 1e-6
    assert float(info_nce(vectors, vectors.roll(1, 0), torch.tensor(0.05))) == pytest.approx(
        20.0, rel=1e-3
    )


def test_the_lowest_temperature_neither_overflows_nor_loses_the_gradient() -> None:
    images = torch.tensor(unit_rows(64, 8, 0), dtype=torch.float32, requires_grad=True)
    texts = torch.tensor(unit_rows(64, 8, 1), dtype=torch.float32)
    loss = info_nce(images, texts, torch.tensor(0.01))
    loss.backward()
    assert torch.isfinite(loss)
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


def test_gradients_of_both_sides_and_of_the_temperature_are_right() -> None:
    images = torch.tensor(unit_rows(4, 3, 0), requires_grad=True)
    texts = torch.tensor(unit_rows(4, 3, 1), requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (images, texts, temperature))
