"""Prefixes on disk: what was put comes back bit for bit, or not at all."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slq.errors import ArtifactError, ArtifactMismatchError
from slq.prefix import Prefix
from slq.prefix_store import PrefixStore

LARGE = 2**30


def prefix(seed: int, seq: int = 7) -> Prefix:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return Prefix(
        keys=tuple(draw(1, 2, seq, 4) for _ in range(3)),
        values=tuple(draw(1, 2, seq, 4) for _ in range(3)),
        mask=torch.ones(1, seq, dtype=torch.bool),
        next_position=torch.tensor([seq - 2]),
        last_hidden=draw(1, 8),
        shows_image=torch.tensor([seed % 2 == 0]),
    )


def same(first: Prefix, second: Prefix) -> bool:
    ours = (*first.keys, *first.values, first.mask, first.next_position)
    theirs = (*second.keys, *second.values, second.mask, second.next_position)
    ours += (first.last_hidden, first.shows_image)
    theirs += (second.last_hidden, second.shows_image)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_a_prefix_comes_back_bit_for_bit_also_in_the_next_run(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "store", "one", LARGE)
    assert store.get("a") is None
    for seed, key in enumerate("abc"):
        store.put(key, prefix(seed, seq=5 + seed))
    again = PrefixStore(tmp_path / "store", "one", LARGE)
    for seed, key in enumerate("abc"):
        found = again.get(key)
        assert found is not None
        assert same(found, prefix(seed, seq=5 + seed))
    assert (again.hits, again.damaged) == (3, 0)
    assert (
        again.num_bytes
        == store.num_bytes
        == sum(f.stat().st_size for f in files(tmp_path / "store"))
    )


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_a_miss_and_is_replaced(tmp_path: Path, damage: str) -> None:
    store = PrefixStore(tmp_path, "one", LARGE)
    store.put("a", prefix(0))
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-20])
    assert store.get("a") is None
    assert store.damaged == int(damage != "gone")
    assert files(tmp_path) == []
    store.put("a", prefix(0))
    found = store.get("a")
    assert found is not None
    assert same(found, prefix(0))


def test_the_least_recently_used_go_when_it_is_full(tmp_path: Path) -> None:
    size = PrefixStore(tmp_path / "one", "f", LARGE)
    size.put("x", prefix(0))
    store = PrefixStore(tmp_path / "many", "f", int(3.5 * size.num_bytes))
    for seed, key in enumerate("abc"):
        store.put(key, prefix(seed))
    assert store.get("a") is not None
    store.put("d", prefix(3))
    assert [key for key in "abcd" if key in store] == ["a", "c", "d"]
    assert len(files(tmp_path / "many")) == 3
    assert store.num_bytes <= 3.5 * size.num_bytes
    tiny = PrefixStore(tmp_path / "none", "f", 10)
    tiny.put("a", prefix(0))
    assert "a" not in tiny


def test_workers_that_start_again_leave_each_other_what_they_wrote(tmp_path: Path) -> None:
    """The bound is each worker's; what another may be using goes only where all of them together wrote too much."""
    size = PrefixStore(tmp_path / "one", "f", LARGE)
    size.put("x", prefix(0))
    folder, bound = tmp_path / "many", int(3.5 * size.num_bytes)
    for worker in range(4):
        store = PrefixStore(folder, "f", bound, shared_by=4)
        for number in range(3):
            store.put(f"{worker}-{number}", prefix(number))
    again = PrefixStore(folder, "f", bound, shared_by=4)
    again.put("new", prefix(9))
    assert len(files(folder)) == 13
    mine = [f"0-{number}" for number in range(3)]
    assert all(again.get(key) is not None for key in mine)
    again.put("newer", prefix(8))  # its own bound: what it used longest ago goes
    assert [key for key in ("new", *mine, "newer") if key in again] == ["0-1", "0-2", "newer"]
    assert len(files(folder)) == 12
    alone = PrefixStore(folder, "f", bound)
    alone.put("newest", prefix(7))
    assert len(files(folder)) == 3  # nobody else uses the folder now
    assert "newest" in alone


def test_another_backbones_store_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    PrefixStore(tmp_path, "one", LARGE).put("a", prefix(0))
    with pytest.raises(ArtifactMismatchError, match="of one, this run's are two"):
        PrefixStore(tmp_path, "two", LARGE)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="no store of prefixes and not empty"):
        PrefixStore(tmp_path, "one", LARGE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_ends_the_writing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PrefixStore(tmp_path, "one", LARGE)
    store.put("a", prefix(0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        store.put("b", prefix(1))
    store.put("c", prefix(2))
    assert store.get("a") is not None
    assert "b" not in store
    assert "c" not in store
    assert [record.message for record in caplog.records if "not written to" in record.message]
    assert all(not path.name.startswith(".") for path in files(tmp_path))


def test_a_file_that_another_process_evicted_is_a_miss(tmp_path: Path) -> None:
    ours = PrefixStore(tmp_path, "one", LARGE)
    ours.put("a", prefix(0))
    theirs = PrefixStore(tmp_path, "one", LARGE)
    for path in files(tmp_path):
        path.unlink()
    assert theirs.get("a") is None
    assert theirs.num_bytes == 0


def test_workers_may_open_one_store_at_the_same_moment(tmp_path: Path) -> None:
    """A half-written start of another worker, or one that was killed there, is no foreign folder."""
    (tmp_path / ".0123.partial").write_text("{")
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: PrefixStore(tmp_path, "one", LARGE), range(32)))
    stores[0].put("a", prefix(0))
    assert PrefixStore(tmp_path, "one", LARGE).get("a") is not None


def test_one_key_stored_twice_with_other_rounding_is_counted_once(tmp_path: Path) -> None:
    first, second = PrefixStore(tmp_path, "one", LARGE), PrefixStore(tmp_path, "one", LARGE)
    first.put("a", prefix(0))
    second.put("a", prefix(1))
    assert len(files(tmp_path)) == 2
    later = PrefixStore(tmp_path, "one", LARGE)
    assert len(files(tmp_path)) == 1
    assert later.num_bytes == files(tmp_path)[0].stat().st_size
    assert later.get("a") is not None
