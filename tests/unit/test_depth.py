"""How many candidates are scored, against counting by hand."""

import math

import numpy as np
import pytest

from slq.errors import ConfigError
from slq.reranking.depth import AdaptiveDepth, depth_of

ALL = AdaptiveDepth(temperature=1.0, sure_lead=4.0, spread=1.0)


def test_without_a_rule_it_is_what_was_asked_for_or_all_there_are() -> None:
    assert depth_of(np.zeros(7), 5, None) == 5
    assert depth_of(np.zeros(3), 5, None) == 3
    assert depth_of(np.zeros(0), 5, None) == 0


@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_candidates_are_all_scored(count: int) -> None:
    """exp(entropy) of equal shares is their number."""
    assert depth_of(np.full(count, 0.4), 20, ALL) == count
    assert depth_of(np.full(count, 0.4), count - 1, ALL) == count - 1


def test_a_sure_lead_leaves_as_many_as_are_always_scored() -> None:
    coarse = np.array([0.1, 4.2, 0.0])  # the best does not stand first
    assert depth_of(coarse, 3, ALL) == 0
    assert depth_of(coarse, 3, ALL.model_copy(update={"least": 2})) == 2
    assert depth_of(np.array([0.1, 4.0, 0.0]), 3, ALL) > 0  # a lead of 3.9
    assert depth_of(coarse, 3, ALL.model_copy(update={"temperature": 2.0})) > 0


def test_the_only_candidate_has_no_rival() -> None:
    assert depth_of(np.array([0.3]), 5, ALL) == 0
    assert depth_of(np.array([0.3, -np.inf]), 5, ALL) == 0


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_spread_of_the_shares_by_the_written_out_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=rng.integers(2, 12))
    rule = AdaptiveDepth(temperature=0.7, sure_lead=100, spread=1.3, least=1)
    weights = [math.exp(score / 0.7) for score in coarse.tolist()]
    shares = [weight / sum(weights) for weight in weights]
    entropy = -sum(share * math.log(share) for share in shares)
    wanted = min(max(1, math.ceil(1.3 * math.exp(entropy))), 9, len(coarse))
    assert depth_of(coarse, 9, rule) == wanted


def test_a_rule_without_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        AdaptiveDepth.parse({"temperature": 0}, source="r.yaml")
