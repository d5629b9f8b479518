"""Plans: what is stored is what was planned, shard by shard, and a corpus that changes is noticed and named."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.corpus import (
    PlanSummary,
    Shard,
    open_corpus,
    read_plan,
    require_same_plan,
    summarise,
    write_plan,
)
from pipelines.storage import open_store
from slq.errors import ArtifactError, DataError, StorageError
from tests.corpora import (
    members_of,
    rows,
    tar_bytes,
    upload,
    write_csv,
    write_images,
    write_jsonl,
    write_parquet,
)
from tests.traced import with_peaks

CHANGED = "the corpus changed while it was read: "


def some_shards(number: int, paths: int = 0) -> Iterator[Shard]:
    for n in range(number):
        names = tuple(f"deep/{n}-{k}.png" for k in range(paths))
        yield Shard(n, "" if paths else f"{n // 3}.csv", n, n + 1, n, n + 9, names, f"{n:016x}")


@pytest.mark.parametrize("number", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_stored_plan_gives_back_every_shard(
    tmp_path: Path, number: int, place: str, request: pytest.FixtureRequest
) -> None:
    summary = write_plan(some_shards(number), tmp_path / "plan.parquet")
    location = str(tmp_path)
    if place == "s3":
        location = upload(tmp_path, request.getfixturevalue("object_store"), "run")
    plan = read_plan(open_store(location), "plan.parquet")
    wanted = list(some_shards(number))
    assert (len(plan), plan.summary) == (number, summary)
    assert list(plan) == wanted
    backwards = range(number - 1, -1, -37)
    assert [plan.shard(n) for n in backwards] == [wanted[n] for n in backwards]
    for beyond in (-1, number):
        with pytest.raises(ArtifactError, match=rf"plan\.parquet has no shard {beyond}; it has"):
            plan.shard(beyond)


def test_row_groups_hold_64_shards_or_fewer_with_many_paths(tmp_path: Path) -> None:
    file = tmp_path / "plan.parquet"
    for number, paths, sizes in ((130, 0, [64, 64, 2]), (7, 30_000, [3, 3, 1])):
        write_plan(some_shards(number, paths), file)
        metadata = pq.ParquetFile(file).metadata
        assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == sizes
        plan = read_plan(open_store(tmp_path), "plan.parquet")
        assert [plan.shard(n) for n in range(number)] == list(some_shards(number, paths))


def test_a_plan_is_the_same_file_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_plan(some_shards(100), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_summary_counts_and_names_the_content(tmp_path: Path) -> None:
    corpus = open_corpus(write_parquet(tmp_path / "c.parquet", rows()))
    summary = summarise(corpus.shards(5))
    assert (summary.num_shards, summary.num_rows) == (5, 23)
    assert summary == write_plan(corpus.shards(5), tmp_path / "plan.parquet")
    assert summary.digest != summarise(corpus.shards(6)).digest
    unknown = Shard(0, "a.tar", 0, -1)
    assert summarise([unknown, Shard(1, "b", 0, 5)]) == PlanSummary(
        2, None, summarise([unknown, Shard(1, "b", 0, 5)]).digest
    )


def test_a_plan_that_is_gone_damaged_or_none_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ArtifactError, match=r"gone cannot be read: .*; embed into another storage"):
        read_plan(store, "gone")
    (tmp_path / "damaged").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="damaged cannot be read"):
        read_plan(store, "damaged")
    write_parquet(tmp_path / "other", rows())
    with pytest.raises(ArtifactError, match="other is no plan of a corpus"):
        read_plan(store, "other")


def test_a_plan_that_cannot_be_written_is_a_storage_error(small_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written: .*; free space and run"):
        write_plan(some_shards(2000, 20), small_disk / "plan.parquet")


def test_errors_of_the_corpus_come_through(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", [])
    with pytest.raises(DataError, match="is empty"):
        write_plan(open_corpus(path).shards(4), tmp_path / "plan.parquet")


def written_and_read(number: int, folder: Path) -> None:
    write_plan(some_shards(number), folder / "plan.parquet")
    for _ in read_plan(open_store(folder), "plan.parquet"):
        pass


def test_writing_and_reading_a_plan_takes_no_more_memory_than_its_footer(tmp_path: Path) -> None:
    runs = with_peaks(written_and_read, (1_000, tmp_path), (20_000, tmp_path))
    (_, few), (_, many) = runs
    assert many < few + 12 * 19_000  # bytes per shard; the shards themselves take 800


def images(folder: Path) -> None:
    write_images(folder)


def manifests(folder: Path) -> None:
    for n in range(4):
        write_jsonl(folder / f"{n}.jsonl", rows()[4 * n : 4 * n + 4])
    (folder / "0a.jsonl").write_text("\n")  # no rows, so it is in no shard


def tables(folder: Path) -> None:
    for n in range(4):
        write_parquet(folder / f"{n}.parquet", rows()[4 * n : 4 * n + 4])


FORMATS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "images": (images, "03.PNG", "99.png"),
    "jsonl": (manifests, "2.jsonl", "9.jsonl"),
    "parquet": (tables, "2.parquet", "9.parquet"),
}


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("change", ["gone", "another", "added", "added first"])
def test_a_corpus_that_changed_is_named_with_its_file_and_shard(
    tmp_path: Path, kind: str, change: str, place: str, request: pytest.FixtureRequest
) -> None:
    write, name, new = FORMATS[kind]
    write(tmp_path / "c")
    (tmp_path / "c" / "03.PNG").write_bytes(b"x") if kind == "images" else None
    location = str(tmp_path / "c")
    if place == "s3":
        location = upload(tmp_path / "c", request.getfixturevalue("object_store"), "c")
    corpus = open_corpus(location, kind)  # type: ignore[arg-type]
    summary = write_plan(corpus.shards(2), tmp_path / "plan.parquet")
    plan = read_plan(open_store(tmp_path), "plan.parquet")
    require_same_plan(corpus, plan)

    source = open_store(location).read(name)
    if change == "gone":
        corpus.store.remove(name)
    else:
        new = f"!{new}" if change == "added first" else new
        if kind == "parquet":
            source = write_parquet(tmp_path / "other", rows()[:3]).read_bytes()
        corpus.store.write(
            name if change == "another" else new, source + b"\n" * (kind != "parquet")
        )
    shards = [shard for shard in plan if name in shard.files]
    what = f"{name} of shard {shards[0].shard_id} is {change}"
    if change.startswith("added"):
        what = f"{new} of no shard was added"
        for shard in shards:
            corpus.require_unchanged(shard)
    else:
        for shard in shards:
            assert corpus.state(shard) != shard.state
            with pytest.raises(DataError, match=f"{CHANGED}{name} of shard {shard.shard_id} is"):
                corpus.require_unchanged(shard)
    with pytest.raises(DataError, match=f"{CHANGED}{what}; let it rest"):
        require_same_plan(corpus, plan)
    assert summarise(corpus.shards(2)).digest != summary.digest  # planning again tells the same


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "webdataset", "images", "parquet"])
def test_rows_are_read_again_only_where_a_mended_file_has_left_them_in_their_places(
    tmp_path: Path, kind: str
) -> None:
    """Two bytes more in the first shard of a text, and each shard behind it would begin inside of another row."""
    writers: dict[str, Callable[[Path], object]] = {
        "text": lambda folder: (folder / "a.txt").write_bytes(b"r\xe9d\nfox\nbee\nowl\n"),
        "jsonl": lambda folder: write_jsonl(folder / "a.jsonl", rows()),
        "csv": lambda folder: write_csv(folder / "a.csv", rows()),
        "webdataset": lambda folder: (folder / "a.tar").write_bytes(tar_bytes(members_of(rows()))),
        "images": write_images,
        "parquet": lambda folder: write_parquet(folder / "a.parquet", rows()),
    }
    (tmp_path / "c").mkdir()
    writers[kind](tmp_path / "c")
    corpus = open_corpus(tmp_path / "c", kind)  # type: ignore[arg-type]
    shard = list(corpus.shards(2))[-1]
    corpus.require_mendable(shard)
    name = shard.files[-1]
    file = tmp_path / "c" / name
    file.write_bytes(file.read_bytes().replace(b"r\xe9d", b"r\xc3\xa9d") + b"\n")
    if kind in ("images", "parquet"):
        corpus.require_mendable(shard)
        return
    with pytest.raises(
        DataError, match=rf"{name} was written to since it was planned, and rows .* may have moved"
    ):
        corpus.require_mendable(shard)


def test_files_that_come_or_go_after_the_plan_shift_no_row(tmp_path: Path) -> None:
    write_images(tmp_path)
    corpus = open_corpus(tmp_path)
    shards = list(corpus.shards(4))
    planned = [record.id for shard in shards for record in corpus.records(shard)]
    (tmp_path / "000.png").write_bytes(b"x")  # first of all by name
    (tmp_path / planned[2]).unlink()
    found = [record for shard in shards for record in corpus.records(shard)]
    assert [record.id for record in found] == planned
    assert [record.id for record in found if record.problem] == [planned[2]]


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_a_table_that_lost_rows_after_the_plan_is_named_with_the_shard(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    path = write(tmp_path / f"c.{write.__name__.removeprefix('write_')}", rows())
    corpus = open_corpus(path)
    shards = list(corpus.shards(8))
    write(path, rows()[:18])
    with pytest.raises(DataError, match=rf"{CHANGED}shard 2 has 2 rows, 7 were planned"):
        list(corpus.records(shards[2]))
    with pytest.raises(DataError, match=rf"{CHANGED}c\.\w+ of shard 0 is another; let it rest"):
        corpus.require_unchanged(shards[0])
    path.unlink()
    with pytest.raises(DataError, match=r"c\.\w+ cannot be read: it is gone"):
        list(corpus.records(shards[2]))
    with pytest.raises(DataError, match=rf"{CHANGED}c\.\w+ of shard 2 is gone"):
        corpus.require_unchanged(shards[2])


def test_the_digest_changes_with_a_file_of_equal_size(tmp_path: Path) -> None:
    write_images(tmp_path)
    before = summarise(open_corpus(tmp_path).shards(4)).digest
    path = tmp_path / "00.PNG"
    path.write_bytes(b"x" * path.stat().st_size)
    assert summarise(open_corpus(tmp_path).shards(4)).digest != before


def test_the_digest_is_the_same_wherever_the_files_lie(tmp_path: Path, object_store: str) -> None:
    write_images(tmp_path / "c")
    locations = [upload(tmp_path / "c", object_store, place) for place in ("one", "two/deep")]
    one, two = (summarise(open_corpus(location).shards(4)).digest for location in locations)
    assert one == two
