"""Pieces travel whole, batches pad little, and the driver knows when a shard is complete."""

import itertools
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.embedding.arrivals import Arrivals
from pipelines.embedding.batches import (
    batches_by_tokens,
    pack_prompts,
    padded,
    unpack_prompts,
)
from pipelines.embedding.pieces import Piece, Work, failure_block, is_failure, rows_schema
from pipelines.embedding.write import Written
from pipelines.failures import raise_failure
from slq.errors import DataError, MediaError, SlqError, StorageError
from slq.schema import Item
from tests.families import BUILDERS, picture

MIXED = [
    Item(image=picture(2, 3, 1)),
    Item(text="a red fox"),
    Item(text="a fox left of two bees", image=picture(4, 2, 2)),
    Item(text="bees"),
]


def alt_text_lengths(count: int) -> list[int]:
    """Tokens of web alt texts: log-normal about 12, as in LAION's captions, cut at 128."""
    rng = np.random.default_rng(1)
    lengths: list[int] = np.clip(np.exp(rng.normal(2.5, 0.7, count)), 1, 128).astype(int).tolist()
    return lengths


def waste(lengths: list[int], batches: list[list[int]]) -> float:
    total = sum(padded(lengths[n] for n in batch) for batch in batches)
    return 1 - sum(lengths) / total


def test_sorted_batches_waste_less_than_three_percent_of_alt_texts() -> None:
    lengths = alt_text_lengths(4096)
    ours = batches_by_tokens(lengths, [False] * 4096, batch_size=32, batch_tokens=8192)
    unsorted = [list(range(start, start + 32)) for start in range(0, 4096, 32)]
    assert waste(lengths, ours) <= 0.03
    assert waste(lengths, unsorted) > 0.4


@pytest.mark.parametrize(
    ("batch_size", "batch_tokens"), [(1, 9), (8, 64), (32, 200), (1000, 10**9)]
)
def test_batches_hold_everything_once_within_both_limits(
    batch_size: int, batch_tokens: int
) -> None:
    rng = random.Random(3)
    lengths = [rng.randint(1, 120) for _ in range(257)]
    shown = [rng.random() < 0.3 for _ in lengths]
    batches = batches_by_tokens(lengths, shown, batch_size=batch_size, batch_tokens=batch_tokens)
    assert sorted(itertools.chain(*batches)) == list(range(257))
    for batch in batches:
        assert len(batch) <= batch_size
        assert len(batch) == 1 or padded(lengths[n] for n in batch) <= batch_tokens
        assert len({shown[n] for n in batch}) == 1
    assert batches_by_tokens([], [], batch_size=2, batch_tokens=2) == []


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_packed_sequences_come_back_as_they_were(family: str) -> None:
    backbone = BUILDERS[family]()
    prompts = backbone.tokenised(MIXED)
    found, numbers = unpack_prompts(pack_prompts(prompts, [7, 1, 3, 9], torch.float32))
    assert numbers == [7, 1, 3, 9]
    ours, theirs = backbone.collate(found), backbone.prompts(MIXED)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert ours.vision.keys() == theirs.vision.keys()
    for name in ours.vision:
        assert torch.equal(ours.vision[name], theirs.vision[name])


@pytest.mark.parametrize(
    ("family", "stored"), [("qwen3_vl", torch.uint8), ("smolvlm", torch.bfloat16)]
)
def test_pixels_of_a_model_in_half_precision_travel_in_it_or_as_bytes(
    family: str, stored: torch.dtype
) -> None:
    prompts = BUILDERS[family]().tokenised(MIXED)
    found, _ = unpack_prompts(pack_prompts(prompts, range(4), torch.bfloat16))
    ours, theirs = found[2].vision, prompts[2].vision
    assert ours["pixel_values"].dtype == stored
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"].to(stored))
    for name in ours.keys() - {"pixel_values"}:
        assert torch.equal(ours[name], theirs[name])


def rows(count: int) -> pa.Table:
    fields = [pa.field("price", pa.float64())]
    values = [{"row": n, "id": f"i{n}", "user.price": n / 2} for n in range(count)]
    return pa.Table.from_pylist(values, schema=rows_schema(fields))


@pytest.mark.parametrize("count", [0, 5])
def test_a_piece_travels_as_one_row(count: int) -> None:
    vectors = np.arange(count * 6, dtype=np.float32).reshape(2, count, 3) if count else None
    piece = Piece(3, 2, count > 0, rows(count), [b"x" * 9, b""], vectors, Work(1, 2, 3, 0.5))
    block = piece.to_block()
    assert block.num_rows == 1
    found = Piece.from_block(block)
    assert (found.shard_id, found.number, found.last, found.name) == (
        3,
        2,
        count > 0,
        "000003-000002",
    )
    assert found.rows.equals(piece.rows)
    assert found.batches == [b"x" * 9, b""]
    assert found.work == piece.work
    assert not is_failure(block)
    if vectors is not None:
        assert found.vectors is not None
        np.testing.assert_array_equal(found.vectors, vectors)


@pytest.mark.parametrize(
    "error", [StorageError("disk"), DataError("rows"), MediaError("empty", "no bytes")]
)
def test_an_error_of_ours_travels_as_data(error: SlqError) -> None:
    block = failure_block(error)
    assert is_failure(block)
    (record,) = block.to_pylist()
    with pytest.raises(SlqError, match=str(error)) as caught:
        raise_failure(record)
    assert isinstance(caught.value, StorageError if isinstance(error, StorageError) else DataError)
    raise_failure({"failure": None})


def written(shard_id: int, number: int, last: bool, **counts: Any) -> Written:
    return Written(shard_id, number, last, counts.get("good", 1), 0)


def test_a_shard_is_complete_when_all_its_pieces_are_there_in_whatever_order() -> None:
    for order in itertools.permutations(range(4)):
        arrivals = Arrivals()
        found = [arrivals.add(written(5, number, number == 3)) for number in order]
        assert found[:3] == [None] * 3
        complete = found[3]
        assert complete is not None
        assert [piece.number for piece in complete] == [0, 1, 2, 3]
        assert len(arrivals) == 0


def test_a_piece_that_comes_twice_changes_nothing() -> None:
    arrivals = Arrivals()
    assert arrivals.add(written(1, 0, False, good=1)) is None
    assert arrivals.add(written(1, 0, False, good=9)) is None
    complete = arrivals.add(written(1, 1, True))
    assert complete is not None
    assert [piece.good for piece in complete] == [1, 1]
    assert arrivals.add(written(1, 1, True)) is None  # and after the end
    assert len(arrivals) == 0
    assert arrivals.add(written(2, 0, True)) is not None  # a shard of one piece
