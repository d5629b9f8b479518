"""Read-out of hidden states: means, last tokens for either padding, unit length."""

import numpy as np
import pytest
import torch

from slq.pooling import last_token, mean_pool, unit_norm

LENGTHS = [1, 4, 6]
SEQ, HIDDEN = 6, 3


def test_mean_pool_averages_over_the_latent_positions() -> None:
    hidden = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    expected = np.stack([sum(row) / 5 for row in hidden])
    np.testing.assert_allclose(
        mean_pool(torch.tensor(hidden)).numpy(), expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_mean_pool_never_averages_in_less_than_float32(
    given: torch.dtype, expected: torch.dtype
) -> None:
    hidden = torch.full((1, 1000, 1), 1.0, dtype=given)
    pooled = mean_pool(hidden)
    assert pooled.dtype == expected
    assert float(pooled) == 1.0


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64])
def test_last_token_finds_the_last_real_token_for_either_padding(
    left: bool, mask_type: torch.dtype
) -> None:
    hidden = torch.arange(len(LENGTHS) * SEQ * HIDDEN, dtype=torch.float32).view(-1, SEQ, HIDDEN)
    mask = torch.zeros(len(LENGTHS), SEQ, dtype=mask_type)
    for row, length in enumerate(LENGTHS):
        mask[row, SEQ - length if left else 0 : SEQ if left else length] = 1
    expected = torch.stack(
        [hidden[row, SEQ - 1 if left else length - 1] for row, length in enumerate(LENGTHS)]
    )
    assert torch.equal(last_token(hidden, mask), expected)


def test_unit_norm_keeps_the_direction_and_sets_the_length() -> None:
    vectors = np.random.default_rng(1).normal(size=(4, 7)) * [[1e-3], [1.0], [50.0], [1e3]]
    expected = vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(unit_norm(torch.tensor(vectors)).numpy(), expected, rtol=1e-12)


def test_unit_norm_of_nothing_is_nothing_and_not_nan() -> None:
    assert torch.equal(unit_norm(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_pooling_then_norm_passes_gradcheck() -> None:
    hidden = torch.tensor(np.random.default_rng(2).normal(size=(2, 3, 4)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda states: unit_norm(mean_pool(states)), (hidden,))
