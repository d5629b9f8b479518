"""`slq bench rerank`: all sides score alike, and what they cost is what the lengths of sequences say."""

import pytest

from jobs.bench.rerank import measure, pairs_of, run
from jobs.bench.shapes import Shape
from slq.errors import HardwareError
from tests.families import BUILDERS, SIZES

COST = ("vision_passes", "prefix_tokens", "suffix_tokens")


@pytest.mark.parametrize(
    ("family", "builder"), [("internvl", "intern_vl"), ("qwen3_vl", "qwen3_vl")]
)
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_all_sides_score_alike_at_the_cost_that_was_planned(
    family: str, builder: str, direction: str
) -> None:
    shape = Shape(family, SIZES[family], grid=2)
    backbone, pairs = BUILDERS[builder](), pairs_of(shape, direction, 5)
    found = measure(backbone, pairs, direction, repeats=1)
    assert found["largest_difference"] < 1e-5
    assert found["moved"] == 0
    for side, counts in found["counts"].items():
        assert [counts[key] for key in COST] == [found["planned"][side][key] for key in COST]
    passes = {side: counts["vision_passes"] for side, counts in found["counts"].items()}
    if direction == "image_to_text":
        assert passes == {"one_at_a_time": 5, "shared": 1}
    else:
        assert passes == {
            "one_at_a_time": 5, "nothing_kept": 5, "all_missed": 5, "vision_kept": 0, "prefix_kept": 0,
        }  # fmt: skip
        assert found["counts"]["prefix_kept"]["prefix_tokens"] == 0
    assert all(value > 0 for value in found["ratios"].values())


def test_some_sides_may_be_timed_and_all_are_compared() -> None:
    shape = Shape("internvl", SIZES["internvl"], grid=2)
    pairs, some = pairs_of(shape, "text_to_image", 3), ["nothing_kept", "all_missed"]
    found = measure(BUILDERS["intern_vl"](), pairs, "text_to_image", 2, only=some)
    assert list(found["ratios"]) == ["nothing_kept/all_missed"]
    assert sorted(found["median_s"]) == sorted(some)
    assert len(found["counts"]) == 5


def test_candidates_differ_and_the_query_is_shared() -> None:
    shape = Shape("internvl", SIZES["internvl"], grid=2)
    pairs = pairs_of(shape, "text_to_image", 4)
    assert len({id(query) for query, _ in pairs}) == 1
    assert len({candidate.image.tobytes() for _, candidate in pairs if candidate.image}) == 4
    assert len({text.text for _, text in pairs_of(shape, "image_to_text", 9)}) == 9


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_an_error() -> None:
    with pytest.raises(HardwareError, match="torch sees no CUDA GPU"):
        run(["--device", "cuda"])
