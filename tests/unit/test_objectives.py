"""Objectives beyond InfoNCE: loops over scalars in double precision, numeric gradients, and what they reduce to."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slq.errors import ConfigError
from slq.losses import info_nce
from slq.objectives import (
    HardNegatives,
    distillation_loss,
    info_nce_with_negatives,
    matryoshka_info_nce,
)

TEMPERATURE = torch.tensor(0.2, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


def dot(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def normalised(row: list[float]) -> list[float]:
    length = math.sqrt(dot(row, row))
    return [value / length for value in row]


def cost(own: float, others: list[float]) -> float:
    """-log of the own score's share, all of them similarities that are divided already."""
    return -math.log(math.exp(own) / (math.exp(own) + sum(math.exp(o) for o in others)))


def one_direction(
    queries: list[list[float]], documents: list[list[float]], extra: list[list[list[float]]]
) -> float:
    """Mean cost of finding row i, where query i also has its own `extra[i]` wrong documents."""
    total = 0.0
    for i, query in enumerate(queries):
        wrong = [document for j, document in enumerate(documents) if j != i] + extra[i]
        scaled = [dot(query, document) / float(TEMPERATURE) for document in wrong]
        total += cost(dot(query, documents[i]) / float(TEMPERATURE), scaled)
    return total / len(queries)


def written_out(
    images: Tensor,
    texts: Tensor,
    wrong_images: list[list[list[float]]] | None = None,
    wrong_texts: list[list[list[float]]] | None = None,
) -> float:
    none: list[list[list[float]]] = [[] for _ in images]
    rows = images.tolist(), texts.tolist()
    forward = one_direction(rows[0], rows[1], wrong_texts or none)
    return (forward + one_direction(rows[1], rows[0], wrong_images or none)) / 2


@pytest.mark.parametrize("dimensions", [(2,), (1, 3), (4, 2, 6), ()])
def test_matryoshka_is_the_mean_over_prefixes_that_are_normalised_again(
    dimensions: tuple[int, ...],
) -> None:
    images, texts = unit_rows(5, 6), unit_rows(5, 6, seed=1)
    losses = []
    for length in {*dimensions, 6}:
        cut = [
            torch.tensor([normalised(row[:length]) for row in side.tolist()], dtype=torch.float64)
            for side in (images, texts)
        ]
        losses.append(written_out(*cut))
    ours = matryoshka_info_nce(images, texts, TEMPERATURE, dimensions)
    assert float(ours) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("dimensions", [(), (6,)])
def test_matryoshka_with_the_full_length_alone_is_info_nce(dimensions: tuple[int, ...]) -> None:
    images, texts = unit_rows(5, 6), unit_rows(5, 6, seed=1)
    ours = matryoshka_info_nce(images, texts, TEMPERATURE, dimensions)
    assert torch.equal(ours, info_nce(images, texts, TEMPERATURE))


@pytest.mark.parametrize("dimensions", [(0,), (7,), (-1, 2), (2, 2)])
def test_matryoshka_refuses_lengths_that_are_none(dimensions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must be different lengths from 1 to the embedding's 6"):
        matryoshka_info_nce(unit_rows(2, 6), unit_rows(2, 6), TEMPERATURE, dimensions)


def test_matryoshka_pulls_the_first_dimensions_too() -> None:
    images = unit_rows(8, 6).requires_grad_()
    texts = unit_rows(8, 6, seed=1)
    full, nested = (
        torch.autograd.grad(matryoshka_info_nce(images, texts, TEMPERATURE, d), images)[0]
        for d in ((), (2,))
    )
    # the tail has a gradient from the full length only, which is half of the mean
    assert torch.allclose(nested[:, 2:], full[:, 2:] / 2, rtol=1e-12)
    assert not torch.allclose(nested[:, :2], full[:, :2] / 2, rtol=1e-3)


def kl(teacher: list[float], student: list[float]) -> float:
    """Sum of p log(p / q) of two softmaxes, from scores that are divided already."""
    sums = [sum(math.exp(score) for score in side) for side in (teacher, student)]
    p, q = (
        [math.exp(score) / total for score in side]
        for side, total in zip((teacher, student), sums, strict=True)
    )
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_distillation_is_the_divergence_of_two_softmaxes() -> None:
    similarities, margins = random(4, 5).tanh(), 3 * random(4, 5, seed=1)
    expected = sum(
        kl([m / 1.5 for m in margins[n].tolist()], [s / 0.2 for s in similarities[n].tolist()])
        for n in range(4)
    )
    ours = distillation_loss(similarities, margins, TEMPERATURE, 1.5)
    assert float(ours) == pytest.approx(expected / 4, rel=1e-12)


def test_distillation_leaves_out_absent_candidates_whatever_they_hold() -> None:
    similarities, margins = random(4, 5).tanh(), 3 * random(4, 5, seed=1)
    counts = (5, 3, 1, 0)
    present = torch.tensor([[n < count for n in range(5)] for count in counts])
    similarities = similarities.masked_fill(~present, 0.99).requires_grad_()
    expected = sum(
        kl(
            [m / 1.5 for m in margins[n, :count].tolist()],
            [s / 0.2 for s in similarities[n, :count].tolist()],
        )
        for n, count in enumerate(counts)
        if count
    )
    ours = distillation_loss(similarities, margins, TEMPERATURE, 1.5, present=present)
    assert ours.item() == pytest.approx(expected / 4, rel=1e-12)
    gradient = torch.autograd.grad(ours, similarities)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[~present] == 0).all()
    assert (gradient[2:].abs() < 1e-15).all()  # one candidate or none: nothing to learn


def test_distillation_is_zero_where_the_stages_agree_and_positive_elsewhere() -> None:
    similarities = random(6, 5).tanh()
    agreeing = similarities / TEMPERATURE * 2.0 + 7.0  # a softmax does not see the shift
    assert float(distillation_loss(similarities, agreeing, TEMPERATURE, 2.0)) == pytest.approx(
        0.0, abs=1e-12
    )
    assert float(distillation_loss(similarities, -agreeing, TEMPERATURE, 2.0)) > 0.1


def test_distillation_survives_margins_of_hundreds_in_single_precision() -> None:
    similarities = random(3, 4).tanh().float().requires_grad_()
    margins = 500 * random(3, 4, seed=1).float()
    loss = distillation_loss(similarities, margins, torch.tensor(0.01), 0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert similarities.grad is not None
    assert torch.isfinite(similarities.grad).all()


def test_distillation_sends_no_gradient_to_the_teacher() -> None:
    similarities, margins = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    distillation_loss(similarities, margins, TEMPERATURE, 1.0).backward()
    assert margins.grad is None
    assert similarities.grad is not None


def test_distillation_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"one shape, not \(3, 4\) and \(3, 5\)"):
        distillation_loss(random(3, 4), random(3, 5), TEMPERATURE, 1.0)
    present = torch.ones(3, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"one shape, not .* and \(3, 1\)"):
        distillation_loss(random(3, 4), random(3, 4), TEMPERATURE, 1.0, present=present)
    with pytest.raises(ConfigError, match=r"teacher_temperature is 0\.0; it must be above 0"):
        distillation_loss(random(3, 4), random(3, 4), TEMPERATURE, 0.0)


def negatives(counts: tuple[int, ...], width: int, seed: int) -> HardNegatives:
    """`counts[i]` negatives for query i; the absent ones are large, so that a leak shows."""
    vectors = unit_rows(len(counts), max(counts), width, seed=seed)
    present = torch.tensor([[n < count for n in range(max(counts))] for count in counts])
    return HardNegatives(vectors.masked_fill(~present[:, :, None], 9.0), present)


def lists(given: HardNegatives) -> list[list[list[float]]]:
    return [
        [vector for vector, there in zip(row, mask, strict=True) if there]
        for row, mask in zip(given.vectors.tolist(), given.present.tolist(), strict=True)
    ]


def test_negatives_join_the_denominator_of_their_own_row_alone() -> None:
    images, texts = unit_rows(4, 6), unit_rows(4, 6, seed=1)
    wrong_images, wrong_texts = negatives((2, 0, 3, 1), 6, 2), negatives((1, 2, 0, 0), 6, 3)
    for chosen in ((wrong_images, None), (None, wrong_texts), (wrong_images, wrong_texts)):
        ours = info_nce_with_negatives(
            images, texts, TEMPERATURE, negative_images=chosen[0], negative_texts=chosen[1]
        )
        expected = written_out(images, texts, *(side and lists(side) for side in chosen))
        assert float(ours) == pytest.approx(expected, rel=1e-12)


def test_without_any_negative_it_is_info_nce() -> None:
    images, texts = unit_rows(4, 6), unit_rows(4, 6, seed=1)
    plain = info_nce(images, texts, TEMPERATURE)
    absent = HardNegatives(torch.full((4, 3, 6), 9.0).double(), torch.zeros(4, 3).bool())
    empty = HardNegatives(torch.zeros(4, 0, 6).double(), torch.zeros(4, 0).bool())
    assert torch.equal(info_nce_with_negatives(images, texts, TEMPERATURE), plain)
    for none in (absent, empty):
        ours = info_nce_with_negatives(
            images, texts, TEMPERATURE, negative_images=none, negative_texts=none
        )
        assert float(ours) == pytest.approx(float(plain), rel=1e-14)


def test_absent_negatives_get_no_gradient_and_present_ones_are_pushed_away() -> None:
    images, texts = unit_rows(3, 6), unit_rows(3, 6, seed=1)
    given = negatives((2, 0, 1), 6, 2)
    vectors = given.vectors.clone().requires_grad_()
    loss = info_nce_with_negatives(
        images, texts, TEMPERATURE, negative_images=HardNegatives(vectors, given.present)
    )
    gradient = torch.autograd.grad(loss, vectors)[0]
    assert (gradient[~given.present] == 0).all()
    # a step against the gradient lowers the similarity to the own text
    towards_text = (gradient * texts[:, None]).sum(-1)
    assert (towards_text[given.present] > 0).all()


def test_negatives_of_another_shape_are_refused() -> None:
    images, texts = unit_rows(3, 6), unit_rows(3, 6, seed=1)
    for shape in ((2, 4, 6), (3, 4, 5)):
        wrong = HardNegatives(random(*shape), torch.ones(shape[:2], dtype=torch.bool))
        with pytest.raises(ConfigError, match=r"do not belong to a batch of \(3, 6\)"):
            info_nce_with_negatives(images, texts, TEMPERATURE, negative_texts=wrong)
    for vectors, present in (
        (random(3, 6), torch.ones(3, 6).bool()),
        (random(3, 4, 6), torch.ones(3, 5).bool()),
        (random(3, 4, 6), torch.ones(3, 4)),
    ):
        with pytest.raises(ConfigError, match=r"hard negatives need vectors"):
            HardNegatives(vectors, present)


def test_gradients_are_the_numeric_ones() -> None:
    images, texts = unit_rows(3, 4).requires_grad_(), unit_rows(3, 4, seed=1).requires_grad_()
    temperature = TEMPERATURE.clone().requires_grad_()
    present = torch.tensor([[True, True], [True, False], [False, False]])
    vectors = unit_rows(3, 2, 4, seed=2).requires_grad_()
    similarities, margins = random(3, 2).requires_grad_(), random(3, 2, seed=1)

    def nested(images: Tensor, texts: Tensor, temperature: Tensor) -> Tensor:
        return matryoshka_info_nce(images, texts, temperature, (1, 3))

    def mined(images: Tensor, texts: Tensor, temperature: Tensor, vectors: Tensor) -> Tensor:
        given = HardNegatives(vectors, present)
        return info_nce_with_negatives(
            images, texts, temperature, negative_images=given, negative_texts=given
        )

    def distilled(similarities: Tensor, temperature: Tensor) -> Tensor:
        return distillation_loss(similarities, margins, temperature, 1.5, present=present)

    assert torch.autograd.gradcheck(nested, (images, texts, temperature))
    assert torch.autograd.gradcheck(mined, (images, texts, temperature, vectors))
    assert torch.autograd.gradcheck(distilled, (similarities, temperature))
