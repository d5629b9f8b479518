"""A cascade against doing its stages by hand."""

import pytest

from slq.backbones.base import Backbone
from slq.cascade import Cascade, Stage
from slq.errors import ConfigError
from slq.reranker import Reranker
from tests.families import BUILDERS, picture

QUERY = "a small red dog"
COARSE = [0.3, 0.9, 0.1, 0.8, 0.5, 0.7, 0.2]


@pytest.fixture(scope="module")
def models() -> tuple[Backbone, Backbone]:
    return BUILDERS["qwen3_vl"](), BUILDERS["intern_vl"]()


def test_each_stage_orders_the_best_of_the_one_before(models: tuple[Backbone, Backbone]) -> None:
    small, large = models
    candidates = [picture(2, 3, seed) for seed in range(7)]
    found = Cascade([Stage(Reranker(small), 5), Stage(Reranker(large), 2)]).rank(
        QUERY, candidates, COARSE
    )
    first = Reranker(small).rank(QUERY, candidates, COARSE, depth=5)
    best = [one.index for one in first[:2]]
    margins = [
        one.fine_score
        for one in sorted(
            Reranker(large).rank(QUERY, [candidates[n] for n in best]), key=lambda one: one.index
        )
    ]
    second = [n for _, n in sorted(zip(margins, best, strict=True), reverse=True)]
    assert [one.index for one in found] == [*second, *(one.index for one in first[2:])]
    assert [one.stage for one in found] == [1, 1, 0, 0, 0, None, None]
    assert [one.coarse_score for one in found] == [COARSE[one.index] for one in found]
    for one in found[:2]:
        assert one.fine_score == pytest.approx(
            dict(zip(best, margins, strict=True))[one.index], abs=1e-5
        )
    for one, before in zip(found[2:], first[2:], strict=True):
        assert one.fine_score == (before.fine_score and pytest.approx(before.fine_score, abs=1e-5))


def test_a_candidate_that_cannot_be_read_keeps_its_place_through_all_stages(
    models: tuple[Backbone, Backbone],
) -> None:
    small, large = models
    candidates = [picture(2, 3, seed) for seed in range(4)]
    cascade = Cascade([Stage(Reranker(small), 4), Stage(Reranker(large), 3)])
    found = cascade.rank(QUERY, [candidates[0], "", *candidates[2:]], [0.9, 0.8, 0.7, 0.6])
    assert found[1].index == 1
    assert found[1].problem
    assert found[1].stage is None
    assert sorted(one.index for one in found) == [0, 1, 2, 3]


def test_without_a_budget_left_the_coarse_order_stays(models: tuple[Backbone, Backbone]) -> None:
    cascade = Cascade([Stage(Reranker(model), 3) for model in models])
    found = cascade.rank(QUERY, [picture(2, 2, n) for n in range(3)], [0.1, 0.3, 0.2], budget_s=0)
    assert [(one.index, one.stage) for one in found] == [(1, None), (2, None), (0, None)]
    assert cascade.rank(QUERY, []) == []


@pytest.mark.parametrize("depths", [[], [2, 3], [3, 0]])
def test_a_cascade_without_sense_is_refused(
    models: tuple[Backbone, Backbone], depths: list[int]
) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        Cascade([Stage(Reranker(models[0]), depth) for depth in depths])
