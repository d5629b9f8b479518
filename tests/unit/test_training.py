"""Training without a cluster: the order of pairs, the learning rate, cached prefixes, gradients of two ranks."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from slq.backbones import Backbone, load_backbone
from slq.errors import ConfigError
from slq.latent_queries import LatentQueries
from slq.training import (
    PairSampler,
    PrefixSource,
    RetrievalModule,
    TrainConfig,
    deepspeed_config,
    finite,
    learning_rate_scale,
    rank_slice,
)

# 60 pairs of 36 images: some with one caption, some with two, some with three
KEYS = [f"image{n}" for n in range(36)] + [f"image{n}" for n in range(18)] + ["image0"] * 6
BATCH = 12


def steps(sampler: PairSampler, first: int, last: int) -> list[tuple[int, list[int]]]:
    return [(step, batch.tolist()) for step, batch in sampler.batches(first, last)]


@pytest.fixture(scope="module")
def sampler() -> PairSampler:
    return PairSampler(KEYS, BATCH, seed=5)


def test_the_same_seed_gives_the_same_order_and_another_seed_another(sampler: PairSampler) -> None:
    assert steps(sampler, 0, 20) == steps(PairSampler(list(KEYS), BATCH, seed=5), 0, 20)
    assert steps(sampler, 0, 20) != steps(PairSampler(KEYS, BATCH, seed=6), 0, 20)


@pytest.mark.parametrize("seed", range(20))
def test_no_image_stands_twice_in_a_batch(seed: int) -> None:
    for _, batch in steps(PairSampler(KEYS, BATCH, seed=seed), 0, 20):
        assert len(batch) == BATCH
        assert len({KEYS[pair] for pair in batch}) == BATCH


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_shows_each_pair_once_at_most_and_most_of_them(seed: int) -> None:
    sampler = PairSampler(KEYS, BATCH, seed=seed)
    for number in range(3):
        shown = Counter(int(pair) for batch in sampler.epoch(number) for pair in batch)
        assert max(shown.values()) == 1
        assert len(shown) >= len(KEYS) - 2 * BATCH
    assert not np.array_equal(sampler.epoch(0)[0], sampler.epoch(1)[0])


def test_distinct_images_are_all_shown_in_an_epoch() -> None:
    sampler = PairSampler([str(n) for n in range(48)], BATCH, seed=0)
    assert sorted(np.concatenate(sampler.epoch(0)).tolist()) == list(range(48))


def test_over_epochs_every_pair_is_shown(sampler: PairSampler) -> None:
    shown = {pair for _, batch in steps(sampler, 0, 40) for pair in batch}
    assert shown == set(range(len(KEYS)))


@pytest.mark.parametrize("first", [1, 3, 4, 5, 11, 19])
def test_resuming_gives_the_tail_of_the_full_run(sampler: PairSampler, first: int) -> None:
    full = steps(sampler, 0, 20)
    assert [step for step, _ in full] == list(range(20))
    assert steps(sampler, first, 20) == full[first:]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_see_the_global_batch_in_order(sampler: PairSampler, world: int) -> None:
    for _, batch in sampler.batches(0, 8):
        parts = [rank_slice(batch, rank, world) for rank in range(world)]
        assert np.concatenate(parts).tolist() == batch.tolist()
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_too_few_images_for_a_batch_is_an_error_that_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match="global_batch is 12, but the data has only 2 distinct"):
        PairSampler(["a", "a", "b"] * 10, BATCH, seed=0)
    PairSampler([str(n) for n in range(BATCH)], BATCH, seed=0)


def test_the_learning_rate_warms_up_then_falls_to_zero() -> None:
    config = TrainConfig(num_steps=10, warmup_steps=4)
    scales = [learning_rate_scale(step, config) for step in range(11)]
    assert scales == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    without = TrainConfig(num_steps=4, warmup_steps=0)
    assert [learning_rate_scale(step, without) for step in range(4)] == [1, 0.75, 0.5, 0.25]


def test_the_learning_rate_of_a_run_shorter_than_its_warm_up_stays_in_bounds() -> None:
    config = TrainConfig(num_steps=3, warmup_steps=10)
    assert [learning_rate_scale(step, config) for step in range(3)] == pytest.approx(
        [0.1, 0.2, 0.3]
    )
    assert learning_rate_scale(30, config) == 0


def test_the_deepspeed_configuration_says_what_the_recipe_says() -> None:
    config = deepspeed_config(TrainConfig(zero_stage=1, clip_norm=0.5), 4)
    assert config["zero_optimization"] == {"stage": 1}
    assert config["gradient_clipping"] == 0.5
    # DeepSpeed insists on: batch == micro batch x accumulation x ranks
    assert config["train_batch_size"] == 4 * config["train_micro_batch_size_per_gpu"]
    assert config["gradient_accumulation_steps"] == 1


def test_a_loss_is_finite_or_not() -> None:
    assert finite(torch.tensor(1.0))
    assert not finite(torch.tensor(float("nan")))
    assert not finite(torch.tensor(float("inf")))


# ---- the shipped backbone ----


def latent_queries(backbone: Backbone) -> LatentQueries:
    return LatentQueries(4, backbone.hidden_size, embedding_std=backbone.embedding_std, seed=3)


def pairs_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "train.parquet").to_pylist()


def source_of(backbone: Backbone, pairs: list[dict[str, Any]], **options: Any) -> PrefixSource:
    def read(number: int) -> tuple[bytes, str]:
        return pairs[number]["image"], pairs[number]["text"]

    return PrefixSource(backbone, read, cache_bytes=options.pop("cache_bytes", 2**28), **options)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.set_num_threads(1)
    return load_backbone("tiny")


def same_prefix(first: Any, second: Any) -> bool:
    parts = [
        *zip(first.keys, second.keys, strict=True),
        *zip(first.values, second.values, strict=True),
    ]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in parts)


def test_captions_of_one_image_share_its_prefix(backbone: Backbone, scenes_dir: Path) -> None:
    pairs = pairs_of(scenes_dir)[:4]
    reads: list[int] = []

    def read(number: int) -> tuple[bytes, str]:
        reads.append(number)
        return pairs[number]["image"], pairs[number]["text"]

    source = PrefixSource(backbone, read, cache_bytes=2**28)
    keys = ["a", "a", "b", "b"]
    first = source.images([0, 2], keys)
    assert (source.cache.misses, source.cache.hits, reads) == (2, 0, [0, 2])
    again = source.images([3, 1], keys)
    assert (source.cache.misses, source.cache.hits, reads) == (2, 2, [0, 2])
    assert same_prefix(again, first.select(torch.tensor([1, 0])))
    source.texts([0, 1])
    source.texts([1, 0])
    assert (source.cache.misses, source.cache.hits, reads) == (4, 4, [0, 2, 0, 1])


def test_cached_and_chunked_prefixes_equal_those_of_one_pass(
    backbone: Backbone, scenes_dir: Path
) -> None:
    pairs, numbers = pairs_of(scenes_dir), [5, 1, 9, 3, 7]
    keys = [str(n) for n in range(len(pairs))]
    plain = source_of(backbone, pairs, cache_bytes=0)
    chunked = source_of(backbone, pairs, chunk=2)
    for _ in range(2):
        assert same_prefix(chunked.texts(numbers), plain.texts(numbers))
        assert same_prefix(chunked.images(numbers, keys), plain.images(numbers, keys))
    assert plain.cache.hits == 0
    assert chunked.cache.hits == chunked.cache.misses == 2 * len(numbers)


def test_only_the_latents_and_the_temperature_are_parameters(backbone: Backbone) -> None:
    module = RetrievalModule(backbone, latent_queries(backbone))
    assert sorted(name for name, _ in module.named_parameters()) == [
        "latent_queries.latents",
        "latent_queries.log_temperature",
    ]
    assert not [name for name, value in backbone.model.named_parameters() if value.requires_grad]


def gradients(folder: Path, pairs: list[int]) -> dict[str, Tensor]:
    backbone = load_backbone("tiny")
    module = RetrievalModule(backbone, latent_queries(backbone))
    rows = pairs_of(folder)
    source = source_of(backbone, rows)
    loss = module(source.images(pairs, [row["id"] for row in rows]), source.texts(pairs))
    loss.backward()
    latents = module.latent_queries
    return {
        "loss": loss.detach().clone(),
        "latents": latents.latents.grad.clone(),
        "log_temperature": latents.log_temperature.grad.clone(),
    }


def _rank(number: int, folder: str, out: str, batch: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=number, world_size=2
    )
    found = gradients(Path(folder), rank_slice(np.array(batch), number, 2).tolist())
    for name in ("latents", "log_temperature"):  # what a data-parallel engine does
        dist.all_reduce(found[name])
        found[name] /= 2
    save_file(found, f"{out}/rank{number}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_average_to_the_gradient_of_one_process(scenes_dir: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    batch = [3, 11, 7, 20, 33, 41, 2, 60, 17]  # uneven: five and four
    mp.spawn(_rank, args=(str(scenes_dir), str(tmp_path), batch), nprocs=2)
    truth = gradients(scenes_dir, batch)
    for number in range(2):
        ours = load_file(tmp_path / f"rank{number}.safetensors")
        for name, value in truth.items():
            error = (ours[name] - value).norm() / value.norm()
            assert float(error) <= 1e-6, (name, number)
