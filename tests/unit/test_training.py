"""Training without a cluster: the order of pairs, the learning rate, cached prefixes, gradients of two ranks."""

import hashlib
import math
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
from slq.errors import ConfigError, TrainingError, UnusablePairError
from slq.latent_queries import LatentQueries
from slq.losses import info_nce
from slq.media import decode_image
from slq.prefix import Prefix
from slq.prefix_store import PrefixStore
from slq.schema import Item
from slq.training import (
    MinedRows,
    PairSampler,
    PrefixSource,
    RetrievalModule,
    TrainConfig,
    deepspeed_config,
    finite,
    learning_rate_scale,
    rank_slice,
    substitute,
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


# ---- the block-resident order ----

FIVE = [f"image{n % 96}" for n in range(96 * 5)]  # five captions each, as COCO's


def block(keys: list[str] = FIVE, batch: int = 16, blocks: int = 2, seed: int = 3) -> PairSampler:
    return PairSampler(keys, batch, seed, order="block", block_batches=blocks)


@pytest.mark.parametrize("seed", range(5))
def test_a_block_epoch_shows_every_pair_once_in_as_many_steps_as_a_uniform_one(seed: int) -> None:
    sampler = block(seed=seed)
    batches = sampler.epoch(0)
    assert len(batches) == len(FIVE) // 16
    assert len(PairSampler(FIVE, 16, seed).epoch(0)) <= len(batches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(FIVE)))
    for batch in batches:
        assert len({FIVE[pair] for pair in batch}) == 16


def test_all_captions_of_a_block_come_before_the_next_block() -> None:
    """So an image's prefix is computed once per epoch, however small the cache beyond one block."""
    batches = block().epoch(0)
    for start in range(0, len(batches), 2 * 5):
        shown = Counter(FIVE[pair] for batch in batches[start : start + 10] for pair in batch)
        assert len(shown) == 32
        assert set(shown.values()) == {5}


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_a_worker_meets_its_images_again(world: int) -> None:
    sampler = block()
    owners: dict[str, set[int]] = {}
    for number in range(3):
        for batch in sampler.epoch(number):
            for rank in range(world):
                for pair in rank_slice(batch, rank, world):
                    owners.setdefault(FIVE[pair], set()).add(rank)
    assert {len(ranks) for ranks in owners.values()} == {1}


def test_sub_epochs_mix_their_batches_anew_and_epochs_their_blocks() -> None:
    sampler = block()
    first, second = (
        [frozenset(FIVE[pair] for pair in batch) for batch in sampler.epoch(number)]
        for number in range(2)
    )
    assert len(set(first[:10])) == 10  # 2 batches of each of 5 sub-epochs over the same 32 images
    assert set(first).isdisjoint(second)


@pytest.mark.parametrize("seed", range(5))
def test_uneven_numbers_of_captions_lose_less_than_two_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = [f"image{n}" for n in range(100) for _ in range(int(rng.integers(1, 8)))]
    batches = block(keys, seed=seed).epoch(0)
    shown = Counter(int(pair) for batch in batches for pair in batch)
    assert max(shown.values()) == 1
    assert len(keys) - len(shown) < 2 * 16
    for batch in batches:
        assert len({keys[pair] for pair in batch}) == 16


def test_blocks_resume_at_any_step() -> None:
    full = steps(block(), 0, 70)
    for first in (1, 9, 30, 31, 69):
        assert steps(block(), first, 70) == full[first:]


# ---- pairs that turn out to be unusable ----


def test_a_broken_pair_is_replaced_without_changing_the_others() -> None:
    batch = np.arange(12)
    replaced = substitute(batch, KEYS, {3, 7, 40}, seed=1)
    assert replaced.tolist() == substitute(batch, KEYS, {3, 7, 40}, seed=1).tolist()
    kept = [place for place in range(12) if place not in (3, 7)]
    assert replaced[kept].tolist() == batch[kept].tolist()
    assert {3, 7, 40}.isdisjoint(replaced.tolist())
    assert len({KEYS[pair] for pair in replaced}) == 12
    assert substitute(batch, KEYS, {50}, seed=1) is batch


def test_with_no_image_left_to_replace_a_broken_one_the_data_is_at_fault() -> None:
    with pytest.raises(TrainingError, match="none is left"):
        substitute(np.arange(12), [str(n) for n in range(12)], {3}, seed=0)


def test_a_pair_that_cannot_be_read_is_named_before_any_pass(
    backbone: Backbone, scenes_dir: Path
) -> None:
    pairs = pairs_of(scenes_dir)[:6]
    pairs[4]["image"] = pairs[4]["image"][:200]
    source = source_of(backbone, pairs)
    with pytest.raises(UnusablePairError) as caught:
        source.read([1, 4, 5])
    assert caught.value.pair == 4
    assert source.cache.misses == 0
    source.read([1, 5])
    assert len(source.queries([1, 5])[0]) == 2


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


class Reader:
    """Pairs in memory that notes what was decoded."""

    def __init__(self, pairs: list[dict[str, Any]], keys: list[str] | None = None) -> None:
        self._pairs = pairs
        self.image_keys = self.query_keys = keys or [str(n) for n in range(len(pairs))]
        self.reads: list[tuple[int, str]] = []

    def item(self, pair: int, side: str) -> Item:
        self.reads.append((pair, side))
        row = self._pairs[pair]
        if side == "query":
            return Item(image=decode_image(row["image"]))
        return Item(text=row["text"])

    def digest(self, pair: int) -> str:
        return hashlib.sha256(self._pairs[pair]["image"]).hexdigest()


def source_of(backbone: Backbone, pairs: list[dict[str, Any]], **options: Any) -> PrefixSource:
    return PrefixSource(
        backbone, Reader(pairs), cache_bytes=options.pop("cache_bytes", 2**28), **options
    )


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.set_num_threads(1)
    return load_backbone("tiny")


def same_prefix(first: Prefix, second: Prefix) -> bool:
    """Equal at real tokens; what stands at padding is never read."""
    return all(
        torch.allclose(a, b, atol=1e-5)
        for ours, theirs in zip(first.split(), second.split(), strict=True)
        for a, b in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True)
    )


def test_captions_of_one_image_share_its_prefix(backbone: Backbone, scenes_dir: Path) -> None:
    reader = Reader(pairs_of(scenes_dir)[:4], ["a", "a", "b", "b"])
    source = PrefixSource(backbone, reader, cache_bytes=2**28)
    decoded = [(0, "query"), (2, "query")]
    (first,) = source.queries([0, 2])
    assert (source.cache.misses, source.cache.hits, reader.reads) == (2, 0, decoded)
    (again,) = source.queries([3, 1])
    assert (source.cache.misses, source.cache.hits, reader.reads) == (2, 2, decoded)
    assert same_prefix(again, first.select(torch.tensor([1, 0])))
    source.positives([0, 1])
    source.positives([1, 0])
    assert (source.text_cache.misses, source.text_cache.hits) == (2, 2)
    assert reader.reads == [*decoded, (0, "positive"), (1, "positive")]


def test_what_is_begun_is_decoded_once_and_what_is_cached_never(
    backbone: Backbone, scenes_dir: Path
) -> None:
    reader = Reader(pairs_of(scenes_dir)[:6])
    source = PrefixSource(backbone, reader, cache_bytes=2**28)
    source.begin([0, 1])
    source.begin([1, 2])  # 0 may have been begun for nothing, 1 goes on
    source.read([1, 2])
    source.queries([1, 2])
    source.positives([1, 2])
    wanted = {(pair, side) for pair in (1, 2) for side in ("query", "positive")}
    assert wanted <= set(reader.reads)
    assert max(Counter(reader.reads).values()) == 1
    before = len(reader.reads)
    source.read([2, 1])
    assert len(reader.reads) == before


def test_the_store_gives_what_the_model_gave_and_nothing_is_decoded(
    backbone: Backbone, scenes_dir: Path, tmp_path: Path
) -> None:
    reader = Reader(pairs_of(scenes_dir)[:6])

    def source() -> PrefixSource:
        store = PrefixStore(tmp_path, "tiny", 2**30)
        return PrefixSource(backbone, reader, cache_bytes=0, store=store)

    (first,) = source().queries([0, 3, 5])
    reads = list(reader.reads)
    later = source()
    later.read([0, 3, 5])
    (again,) = later.queries([0, 3, 5])
    assert [entry for entry in reader.reads[len(reads) :] if entry[1] == "query"] == []
    assert later.cached_share == 1
    for ours, theirs in zip(
        (*again.keys, *again.values), (*first.keys, *first.values), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_cached_and_chunked_prefixes_equal_those_of_one_pass(
    backbone: Backbone, scenes_dir: Path
) -> None:
    pairs, numbers = pairs_of(scenes_dir), [5, 1, 9, 3, 7]
    plain = source_of(backbone, pairs, cache_bytes=0)
    chunked = source_of(backbone, pairs, frozen_rows=2)
    for _ in range(2):
        assert same_prefix(chunked.positives(numbers)[0], plain.positives(numbers)[0])
        assert same_prefix(chunked.queries(numbers)[0], plain.queries(numbers)[0])
    assert plain.cache.hits == plain.text_cache.hits == 0
    for cache in (chunked.cache, chunked.text_cache):
        assert cache.hits == cache.misses == len(numbers)


def test_only_the_latents_and_the_temperature_are_parameters(backbone: Backbone) -> None:
    module = RetrievalModule(backbone, latent_queries(backbone))
    assert sorted(name for name, _ in module.named_parameters()) == [
        "adapter.latents",
        "adapter.log_temperature",
    ]
    assert not [name for name, value in backbone.model.named_parameters() if value.requires_grad]


def wrong_for(pairs: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Two negatives of each pair, every third pair's second one absent, and made-up margins."""
    wrong = [(pair + step) % 64 for pair in pairs for step in (1, 2)]
    present = torch.tensor([[True, pair % 3 != 0] for pair in pairs])
    margins = torch.tensor([[2.0, pair / 32 - 1, -1.5] for pair in pairs])
    return wrong, present, margins


def gradients(
    folder: Path, pairs: list[int], chunk_rows: int = 0, *, mined: bool = False
) -> dict[str, Tensor]:
    backbone = load_backbone("tiny")
    latents = latent_queries(backbone)
    module = RetrievalModule(backbone, latents, distillation=0.5, teacher_temperature=2.0)
    rows = pairs_of(folder)
    source = source_of(backbone, rows, chunk_rows=chunk_rows)
    wrong, *known = wrong_for(pairs)
    negatives = MinedRows(source.queries(wrong), *known) if mined else None
    loss = module(source.queries(pairs), source.positives(pairs), negatives)
    loss.backward()
    assert latents.latents.grad is not None
    assert latents.log_temperature.grad is not None
    return {
        "loss": loss.detach().clone(),
        "latents": latents.latents.grad.clone(),
        "log_temperature": latents.log_temperature.grad.clone(),
    }


def test_nested_lengths_enter_the_loss(backbone: Backbone, scenes_dir: Path) -> None:
    rows = pairs_of(scenes_dir)[:6]
    latents = latent_queries(backbone)
    source = source_of(backbone, rows)
    sides = source.queries(range(6)), source.positives(range(6))
    images, texts = (latents.embed(backbone, side[0]) for side in sides)
    nested = [
        info_nce(
            torch.nn.functional.normalize(images[:, :length], dim=1),
            torch.nn.functional.normalize(texts[:, :length], dim=1),
            latents.temperature,
        )
        for length in (192, 32, 8)
    ]
    loss = RetrievalModule(backbone, latents, dimensions=(32, 8))(*sides)
    assert loss.item() == pytest.approx(float(sum(nested).detach()) / 3, rel=1e-6)
    plain = RetrievalModule(backbone, latents)(*sides)
    assert plain.item() == pytest.approx(nested[0].item(), rel=1e-6)


def test_mined_negatives_and_their_margins_enter_the_loss(
    backbone: Backbone, scenes_dir: Path
) -> None:
    """Against sums written out: a negative stands below its own caption only, and the teacher beside it."""
    pairs, latents = [3, 11, 7, 20], latent_queries(backbone)
    source = source_of(backbone, pairs_of(scenes_dir))
    wrong, present, margins = wrong_for(pairs)
    inputs = [source.queries(pairs), source.positives(pairs), source.queries(wrong)]
    images, texts, negatives = (
        latents.embed(backbone, side[0]).detach().double() for side in inputs
    )
    exp, t = math.exp, float(latents.temperature.detach())
    contrast = teaching = 0.0
    for i in range(4):
        own = float(texts[i] @ images[i])
        kept = [float(texts[i] @ negatives[2 * i + k]) for k in range(2) if present[i, k]]
        to_images = sum(exp(float(texts[i] @ image) / t) for image in images)
        to_images += sum(exp(value / t) for value in kept)
        to_texts = sum(exp(float(images[i] @ text) / t) for text in texts)
        contrast += (math.log(to_images) + math.log(to_texts) - 2 * own / t) / 8
        known = [
            float(m) for m, there in zip(margins[i], [True, *present[i]], strict=True) if there
        ]
        teacher = [exp(m / 2) / sum(exp(other / 2) for other in known) for m in known]
        whole = sum(exp(value / t) for value in [own, *kept])
        student = [exp(value / t) / whole for value in [own, *kept]]
        teaching += sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True)) / 4
    options: dict[str, Any] = {"distillation": 0.5, "teacher_temperature": 2.0}
    module = RetrievalModule(backbone, latents, **options)
    loss = module(*inputs[:2], MinedRows(inputs[2], present, margins))
    assert teaching > 0.05
    assert loss.item() == pytest.approx(contrast + 0.5 * teaching, rel=1e-5)
    untaught = module(*inputs[:2], MinedRows(inputs[2], present))
    assert untaught.item() == pytest.approx(contrast, rel=1e-5)
    assert module(*inputs[:2]).item() < untaught.item()


def test_variants_have_the_losses_and_gradients_that_they_have_alone(
    backbone: Backbone, scenes_dir: Path
) -> None:
    pairs = [3, 11, 7, 20, 33]
    source = source_of(backbone, pairs_of(scenes_dir))
    sides = source.queries(pairs), source.positives(pairs)

    def parts() -> list[LatentQueries]:
        std = backbone.embedding_std
        return [
            latent_queries(backbone),
            LatentQueries(2, backbone.hidden_size, embedding_std=std, pooling="last"),
            LatentQueries(3, backbone.hidden_size, embedding_std=std, sets="separate", seed=5),
        ]

    first, *others = together = parts()
    module = RetrievalModule(backbone, first, variants={"a": others[0], "b.c": others[1]})
    module(*sides).backward()
    for number, (ours, alone) in enumerate(zip(together, parts(), strict=True)):
        loss = RetrievalModule(backbone, alone)(*sides)
        loss.backward()
        assert module.losses[number].item() == pytest.approx(loss.item(), rel=1e-6)
        for a, b in zip(ours.parameters(), alone.parameters(), strict=True):
            assert b.grad is not None
            assert b.grad.abs().max() > 0
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 9])
def test_chunks_give_the_loss_and_gradient_of_the_whole_batch(
    scenes_dir: Path, chunk_rows: int, mined: bool
) -> None:
    torch.set_num_threads(1)
    batch = [3, 11, 7, 20, 33, 41, 2, 60, 17]
    whole = gradients(scenes_dir, batch, mined=mined)
    chunked = gradients(scenes_dir, batch, chunk_rows, mined=mined)
    for name, value in whole.items():
        assert float((chunked[name] - value).norm() / value.norm()) <= 1e-5, name


def test_chunks_hold_the_activations_of_one_chunk_at_a_time(
    backbone: Backbone, scenes_dir: Path
) -> None:
    pairs = pairs_of(scenes_dir)
    numbers = list(range(16))

    def saved(chunk_rows: int) -> int:
        source = source_of(backbone, pairs, chunk_rows=chunk_rows)
        module = RetrievalModule(backbone, latent_queries(backbone))
        images, texts = source.queries(numbers), source.positives(numbers)
        held = {t.data_ptr() for part in (*images, *texts) for t in (*part.keys, *part.values)}
        counted: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in held:  # the prefixes are there in both cases
                counted[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(images, texts)
        return sum(counted.values())

    assert saved(4) < 0.1 * saved(0)


def _rank(number: int, folder: str, out: str, batch: list[int], mined: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=number, world_size=2
    )
    mine = rank_slice(np.array(batch), number, 2).tolist()
    found = gradients(Path(folder), mine, mined=mined)
    for name in ("latents", "log_temperature"):  # what a data-parallel engine does
        dist.all_reduce(found[name])
        found[name] /= 2
    save_file(found, f"{out}/rank{number}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("mined", [False, True])
def test_two_ranks_average_to_the_gradient_of_one_process(
    scenes_dir: Path, tmp_path: Path, mined: bool
) -> None:
    torch.set_num_threads(1)
    batch = [3, 11, 7, 20, 33, 41, 2, 60, 17]  # uneven: five and four
    mp.spawn(_rank, args=(str(scenes_dir), str(tmp_path), batch, mined), nprocs=2)
    truth = gradients(scenes_dir, batch, mined=mined)
    for number in range(2):
        ours = load_file(tmp_path / f"rank{number}.safetensors")
        for name, value in truth.items():
            error = (ours[name] - value).norm() / value.norm()
            assert float(error) <= 1e-6, (name, number)
