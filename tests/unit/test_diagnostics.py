"""Measures of the embedding space against loops over scalars, and known answers for special spaces."""

import math

import pytest
import torch
from torch import Tensor

from slq import diagnostics
from slq.diagnostics import (
    alignment,
    dead_latents,
    diagnose,
    latent_norms,
    latent_variation,
    modality_gap,
    retrieval_report,
    uniformity,
)
from slq.errors import ConfigError, DataError

PAIRS = "text_to_image/hit@{}", "image_to_text/hit@{}"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def units(rows: Tensor) -> list[list[float]]:
    return [unit(row) for row in rows.tolist()]


def squared_distance(first: list[float], second: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def mean_row(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_the_modality_gap_is_the_distance_of_the_mean_unit_vectors() -> None:
    images, texts = random(7, 5) + 1, random(4, 5, seed=1)  # no pairs needed
    expected = math.sqrt(squared_distance(mean_row(units(images)), mean_row(units(texts))))
    assert modality_gap(images, texts) == pytest.approx(expected, rel=1e-12)


def test_the_modality_gap_is_zero_for_equal_sides_and_two_for_opposite_points() -> None:
    images = random(7, 5)
    assert modality_gap(images, images.flip(0)) == pytest.approx(0.0, abs=1e-15)
    point = torch.ones(3, 4)
    assert modality_gap(point, -point) == pytest.approx(2.0)


def test_alignment_is_the_mean_squared_distance_of_pairs() -> None:
    images, texts = random(7, 5), random(7, 5, seed=1)
    pairs = list(zip(units(images), units(texts), strict=True))
    expected = sum(squared_distance(*pair) for pair in pairs) / 7
    assert alignment(images, texts) == pytest.approx(expected, rel=1e-12)
    assert alignment(images, images) == 0.0
    assert alignment(images, -images) == pytest.approx(4.0)


@pytest.mark.parametrize("t", [2.0, 0.5, 300.0])
@pytest.mark.parametrize("block_rows", [2, 3, 512])
def test_uniformity_is_the_log_mean_potential_of_all_pairs_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, t: float, block_rows: int
) -> None:
    monkeypatch.setattr(diagnostics, "_BLOCK_ROWS", block_rows)
    rows = units(random(7, 3))
    potentials = [
        math.exp(-t * squared_distance(rows[a], rows[b])) for a in range(7) for b in range(a)
    ]
    ours = uniformity(random(7, 3), t)
    assert ours == pytest.approx(math.log(sum(potentials) / len(potentials)), rel=1e-10)


def test_uniformity_of_known_spaces() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(torch.eye(6)) == pytest.approx(-4.0)  # every squared distance is 2
    opposite = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8.0)
    assert uniformity(opposite, 400.0) == pytest.approx(-1600.0)  # exp of it is no float64


def test_uniformity_of_even_directions_nears_the_integral_over_the_sphere() -> None:
    # two independent uniform points in three dimensions: the cosine is uniform on -1..1, so
    # E exp(-t d^2) = integral of exp(-2 t (1 - c)) / 2 dc = (1 - exp(-4 t)) / (4 t)
    closed = math.log((1 - math.exp(-8.0)) / 8.0)
    assert uniformity(random(3000, 3), 2.0) == pytest.approx(closed, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_measures_take_any_float_type_and_any_length_of_rows(dtype: torch.dtype) -> None:
    images, texts = random(6, 8).to(dtype), random(6, 8, seed=1).to(dtype)
    lengths = torch.tensor([[0.25], [4.0], [1.0], [64.0], [0.5], [2.0]], dtype=dtype)  # exact
    for measure in (modality_gap, alignment):
        exact = measure(images.double(), texts.double())
        assert measure(images * lengths, texts) == pytest.approx(exact, rel=1e-12)
    assert uniformity(images * lengths) == pytest.approx(uniformity(images.double()), rel=1e-12)


def test_measures_leave_no_graph_behind() -> None:
    images = random(4, 3).requires_grad_()
    states = random(4, 2, 3).requires_grad_()
    assert not latent_norms(images).requires_grad
    assert not latent_variation(states).requires_grad
    assert diagnose(images, images, latents=images, states={"images": states})


def test_latent_norms_are_lengths() -> None:
    latents = random(5, 7)
    expected = [math.sqrt(sum(value * value for value in row)) for row in latents.tolist()]
    assert latent_norms(latents).tolist() == pytest.approx(expected, rel=1e-12)
    assert latent_norms(torch.zeros(2, 3)).tolist() == [0.0, 0.0]  # the `zeros` initial values


def written_out_variation(states: Tensor) -> list[float]:
    batch, num_latents, hidden = states.shape
    origin = [0.0] * hidden
    rows = states.tolist()
    energy = sum(squared_distance(h, origin) for row in rows for h in row) / batch / num_latents
    variations = []
    for n in range(num_latents):
        own = [row[n] for row in rows]
        centre = mean_row(own)
        variations.append(sum(squared_distance(h, centre) for h in own) / batch / energy)
    return variations


def test_variation_is_the_spread_of_a_latents_state_over_the_energy_of_all_states() -> None:
    states = random(6, 4, 5) + random(1, 4, 5, seed=1)
    expected = written_out_variation(states)
    assert latent_variation(states).tolist() == pytest.approx(expected, rel=1e-12)
    assert latent_variation(1000 * states).tolist() == pytest.approx(expected, rel=1e-12)
    assert 0 < sum(expected) / 4 < 1


def test_a_latent_is_dead_if_its_state_ignores_the_input_or_drowns_in_the_others() -> None:
    states = random(50, 5, 8)
    states[:, 1] = states[0, 1]  # the same for all
    states[:, 2] *= 0.01  # varies, but nothing of it reaches the mean
    states[:, 3] = states[0, 3] + 0.05 * states[:, 3]  # hardly varies
    states[:, 4] = states[:, 0]  # a copy is alive
    assert dead_latents(states).tolist() == [False, True, True, True, False]
    assert dead_latents(states, 0.5).tolist() == [False, True, True, True, False]
    assert dead_latents(states, 100.0).all()


def test_a_dead_latent_changes_no_difference_of_two_read_outs() -> None:
    """What the definition promises: without it, pooled states differ from one another as before."""
    states = random(20, 4, 8)
    states[:, 2] = states[0, 2]
    dead = dead_latents(states)
    assert dead.tolist() == [False, False, True, False]
    whole, without = states.sum(1), states[:, ~dead].sum(1)
    assert torch.allclose(whole - whole[0], without - without[0], atol=1e-12)
    alive = torch.tensor([True, False, True, True])
    other = states[:, alive].sum(1)
    assert not torch.allclose(whole - whole[0], other - other[0], atol=0.1)


def test_latents_that_all_collapse_together_are_all_dead() -> None:
    constant = random(1, 4, 8).expand(10, -1, -1)
    assert dead_latents(constant).all()
    assert dead_latents(constant + 0.001 * random(10, 4, 8, seed=1)).all()
    assert dead_latents(torch.zeros(10, 4, 8)).all()
    assert latent_variation(torch.zeros(10, 4, 8)).tolist() == [0.0] * 4


def hit_by_counting(queries: Tensor, documents: Tensor, k: int) -> float:
    """Share of queries with fewer than k wrong documents that score as high as their own."""
    rows, columns = units(queries), units(documents)
    found = 0
    for i, row in enumerate(rows):
        scores = [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns]
        better = sum(score >= scores[i] for j, score in enumerate(scores) if j != i)
        found += better < k
    return found / len(rows)


@pytest.mark.parametrize("block_rows", [5, 512])
def test_hits_are_those_of_counting_what_scores_as_high(
    monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(diagnostics, "_BLOCK_ROWS", block_rows)
    images = random(23, 6)
    texts = images + 1.2 * random(23, 6, seed=1)
    report = retrieval_report(images, texts, (1, 3, 10))
    assert list(report) == [name.format(k) for name in PAIRS for k in (1, 3, 10)]
    for k in (1, 3, 10):
        assert report[f"text_to_image/hit@{k}"] == hit_by_counting(texts, images, k)
        assert report[f"image_to_text/hit@{k}"] == hit_by_counting(images, texts, k)
    assert 0 < report["text_to_image/hit@1"] < report["text_to_image/hit@10"] < 1


def test_ties_count_against_us_and_a_depth_beyond_the_batch_finds_all() -> None:
    same = torch.ones(4, 3)
    report = retrieval_report(same, same, (1, 3, 4, 10))
    assert [report[f"text_to_image/hit@{k}"] for k in (1, 3, 4, 10)] == [0.0, 0.0, 1.0, 1.0]
    assert retrieval_report(same[:1], same[:1], (1,)) == dict.fromkeys(
        ("text_to_image/hit@1", "image_to_text/hit@1"), 1.0
    )


def test_diagnose_puts_the_measures_together_under_flat_names() -> None:
    images, texts, latents = random(12, 6), random(12, 6, seed=1), random(4, 6, seed=2)
    states = random(12, 4, 6, seed=3)
    states[:, 3] = 1.0
    report = diagnose(
        images, texts, ks=(1, 5), latents=latents, states={"images": states, "texts": states[:, :3]}
    )
    norms = latent_norms(latents).tolist()
    assert report == {
        "space/modality_gap": modality_gap(images, texts),
        "space/alignment": alignment(images, texts),
        "space/uniformity_images": uniformity(images),
        "space/uniformity_texts": uniformity(texts),
        **retrieval_report(images, texts, (1, 5)),
        "latents/norm_min": min(norms),
        "latents/norm_mean": pytest.approx(sum(norms) / 4),
        "latents/norm_max": max(norms),
        "latents/variation_min_images": 0.0,
        "latents/dead_images": 1.0,
        "latents/variation_min_texts": min(latent_variation(states[:, :3]).tolist()),
        "latents/dead_texts": 0.0,
    }
    assert all(type(value) is float for value in report.values())
    assert "latents/norm_min" not in diagnose(images, texts)


def spoiled(value: float) -> Tensor:
    rows = torch.ones(4, 3)
    rows[2] = value
    return rows


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3), r"images must be \(batch, hidden\) with one row or more, not \(0, 3\)"),
        (torch.ones(3), r"images must be \(batch, hidden\) with one row or more, not \(3,\)"),
        (spoiled(0.0), "images: row 2 of 4 is all zero, so it has no direction"),
        (spoiled(math.nan), "images: 1 of 4 rows hold NaN or infinity, first row 2"),
        (spoiled(math.inf), "images: 1 of 4 rows hold NaN or infinity, first row 2"),
    ],
)
def test_rows_without_a_direction_are_named(images: Tensor, message: str) -> None:
    for measure in (modality_gap, alignment, retrieval_report, diagnose):
        with pytest.raises(DataError, match=message):
            measure(images, images)
    with pytest.raises(DataError, match=message.replace("images", "vectors")):
        uniformity(images)


def test_one_pair_has_no_uniformity_and_two_sides_must_pair_up() -> None:
    one = torch.ones(1, 3)
    assert modality_gap(one, one) == alignment(one, one) == 0.0
    for measure in (uniformity, lambda rows: diagnose(rows, rows)):
        with pytest.raises(DataError, match="there is only one; give two or more"):
            measure(one)
    for measure in (alignment, retrieval_report):
        with pytest.raises(DataError, match=r"images \(1, 3\) and texts \(2, 3\) are no pairs"):
            measure(one, torch.ones(2, 3))


def test_states_and_latents_that_cannot_be_judged_are_refused() -> None:
    for states in (torch.ones(1, 4, 3), torch.ones(4, 3), torch.ones(4, 0, 3)):
        with pytest.raises(DataError, match="of two or more inputs"):
            latent_variation(states)
    with pytest.raises(DataError, match="states: 1 of 4 rows hold NaN"):
        dead_latents(spoiled(math.nan)[:, None])
    with pytest.raises(DataError, match=r"latents must be \(num_latents, hidden\), not \(0, 3\)"):
        latent_norms(torch.zeros(0, 3))
    with pytest.raises(DataError, match="latents: 1 of 4 rows hold NaN"):
        latent_norms(spoiled(math.nan))


def test_settings_out_of_range_are_refused() -> None:
    rows = torch.eye(3)
    with pytest.raises(ConfigError, match=r"uniformity's t is 0; it must be above 0"):
        uniformity(rows, 0)
    with pytest.raises(ConfigError, match=r"threshold is 0; it must be above 0"):
        dead_latents(random(3, 2, 4), 0)
    for ks in ((), (0, 1)):
        with pytest.raises(ConfigError, match="name one depth or more"):
            retrieval_report(rows, rows, ks)
