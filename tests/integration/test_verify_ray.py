"""`slq verify` on a data set that the flow made: sound as it is, and each damage is found, alone and by name."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines.verification.ids as ids
from pipelines.embed import embed
from pipelines.recipe import Recipe
from pipelines.storage import open_store
from pipelines.verification.findings import Report
from pipelines.verify import verify
from slq.artifacts import load_adapter_config
from slq.errors import ArtifactMismatchError
from tests.integration.runs import changed, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS, SHARD = 15, "shards/part-000001.parquet"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture
def sound(tiny_run: Recipe, place: Path, scenes_dir: Path, ray_cluster: None) -> Recipe:
    """15 pictures, one broken, in four shards, with vectors of two adapters in all forms; the first test pays."""
    recipe = changed(
        tiny_run,
        data={"dir": place, "corpus": "pictures"},
        embed={
            "shard_rows": 4,
            "outputs": ("float16", "int8", "binary"),
            "adapters": {"other": place / "other" / "adapter"},
        },
        storage={"dir": place / "run"},
    )
    if not recipe.storage.adapter.is_dir():
        rows = pq.read_table(scenes_dir / "gallery.parquet").slice(0, ROWS).to_pylist()
        (place / "pictures").mkdir()
        for number, row in enumerate(rows):
            data = row["image"] if number != 6 else b"no picture"
            (place / "pictures" / f"{number:02d}.png").write_bytes(data)
        with_untrained_adapter(recipe)
        with_untrained_adapter(changed(recipe, storage={"dir": place / "other"}), seed=5)
        embed(recipe)
    return recipe


@pytest.fixture
def copy(sound: Recipe, tmp_path: Path) -> Path:
    """The data set, to be damaged."""
    return Path(shutil.copytree(sound.storage.embeddings, tmp_path / "embeddings"))


def told(report: Report) -> list[tuple[str, str]]:
    return [(finding.check, finding.place) for finding in report.findings]


def test_a_sound_data_set_gives_no_finding_and_everything_was_looked_at(sound: Recipe) -> None:
    adapters = [sound.embed.adapters["other"], sound.storage.adapter]
    report = verify(sound.storage.embeddings, adapters=adapters)
    assert report.findings == []
    assert report.notes == []
    # 14 of the canary, which has no vectors of further adapters, and 14 of a sample of all rows
    assert report.checked == {
        "files": 5, "counts": 4, "schema": 4, "rows": 14, "vectors": 56, "ids": 15, "embedding": 42,
    }  # fmt: skip
    assert report.largest_difference is not None
    assert 0 < report.largest_difference < 1e-3


def record(root: Path) -> Path:
    return root / "commits" / "000001.json"


def rewrite(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another shard, with the right hash in its record."""
    path = root / SHARD
    pq.write_table(change(pq.read_table(path)), path)
    values = json.loads(record(root).read_text())
    values["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    record(root).write_text(json.dumps(values))


def with_value(name: str, row: int, value: Any) -> Callable[[Path], None]:
    def change(table: pa.Table) -> pa.Table:
        position = table.schema.names.index(name)
        field, values = table.schema.field(position), table[name].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        return table.set_column(position, field, pa.array(values, field.type))

    return lambda root: rewrite(root, change)


def flipped_byte(root: Path) -> None:
    data = bytearray((root / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (root / SHARD).write_bytes(data)


def cut_short(root: Path) -> None:
    os.truncate(root / SHARD, 1000)


def edited_manifest(root: Path) -> None:
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"num_rows": 14', '"num_rows": 15'))


def stray(root: Path) -> None:
    shutil.copy(root / SHARD, root / "shards" / "part-000001-copy.parquet")


def without_ranges(root: Path) -> None:
    (root / "calibration.json").unlink()


@pytest.mark.parametrize(
    ("damage", "check", "name", "message"),
    [
        (flipped_byte, "files", SHARD, "its sha256 is"),
        (cut_short, "files", SHARD, "its sha256 is"),
        (lambda root: (root / SHARD).unlink(), "files", SHARD, "it is gone"),
        (
            lambda root: (root / "errors/part-000001.parquet").unlink(),
            "files", "errors/part-000001.parquet", "it is gone",
        ),
        (lambda root: (root / "canary.parquet").unlink(), "files", "canary.parquet", "is gone"),
        (lambda root: record(root).write_text("{"), "files", "commits/000001.json", "is damaged"),
        (stray, "files", "shards/part-000001-copy.parquet", "no commit record names it"),
        (without_ranges, "files", "calibration.json", "it is gone"),
        (edited_manifest, "counts", "manifest.json", "num_rows is 15"),
        (
            with_value("id", 0, "00.png"), "ids", "shards/part-000000.parquet",
            f"1 id stands more than once: '00.png' in row 0 of shards/part-000000.parquet, row 0 of {SHARD}",
        ),
        (
            with_value("id", 0, "06.png"), "ids", "errors/part-000001.parquet",
            f"'06.png' in row 2 of errors/part-000001.parquet, row 0 of {SHARD}",
        ),
        (
            with_value("embedding", 1, lambda vector: [np.nan, *vector[1:]]), "vectors", SHARD,
            "embedding holds values that are not finite in 1 of 3 rows: '05.png' (row 1)",
        ),
        (
            with_value("embedding", 1, lambda vector: [2 * value for value in vector]), "vectors", SHARD,
            "embedding has no unit norm in 1 of 3 rows: '05.png' (row 1)",
        ),
        (
            with_value("embedding_int8", 2, lambda codes: [code // 2 for code in codes]), "vectors", SHARD,
            "embedding_int8 is not what embedding gives in 1 of 3 rows: '07.png' (row 3)",
        ),
        (with_value("shard_id", 1, 3), "rows", SHARD, "shard_id is not 1 in 1 of 3 rows: 3 (row 1)"),
        (with_value("row_in_shard", 2, 1), "rows", SHARD, "row_in_shard must rise"),
        (
            lambda root: rewrite(root, lambda table: table.append_column("mine", [[1, 2, 3]])),
            "schema", SHARD, "the user's columns are (mine: int64), and () in most shards",
        ),
    ],
)  # fmt: skip
def test_each_damage_gives_exactly_its_finding(
    copy: Path, damage: Callable[[Path], None], check: str, name: str, message: str
) -> None:
    damage(copy)
    report = verify(copy, sample=0)
    assert told(report) == [(check, name)]
    assert message in report.findings[0].message
    assert report.checked["rows"] >= 11, "the other shards were looked at all the same"


def test_ids_are_compared_in_as_many_passes_as_memory_asks_for(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ids, "IDS_AT_ONCE", 4)
    hashes = ids.hashes_of(pa.array([f"{n:02d}.png" for n in range(4)]), 0, 1)
    assert len(set(hashes % 4)) > 1  # so that more than one pass has something to find
    for number in range(4):
        with_value("id", 0, f"{number:02d}.png")(copy)
        (finding,) = verify(copy, sample=0).findings
        assert f"'{number:02d}.png' in row {number} of shards/part-000000" in finding.message
    assert "pass 4 of 4: shard 4/4" in capsys.readouterr().err


def test_a_changed_picture_is_told(sound: Recipe, copy: Path) -> None:
    picture = sound.data.dir / "pictures" / "09.png"
    before = picture.read_bytes()
    sink = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(sink, "PNG")
    picture.write_bytes(sink.getvalue())
    try:
        report = verify(copy)
        assert told(report) == [("embedding", "shards/part-000002.parquet")]
        assert (
            "1 of 28 inputs are others now: the corpus changed: '09.png'"
            in report.findings[0].message
        )
        picture.unlink()
        report = verify(copy)
        assert report.findings == []
        assert "1 of 28 inputs cannot be read any more: '09.png'" in report.notes[-1]
    finally:
        picture.write_bytes(before)


def test_a_vector_of_something_else_is_told(copy: Path) -> None:
    table = pq.read_table(copy / SHARD)
    order = pa.array([1, 0, 2])
    for name in ("embedding", "embedding_int8", "embedding_bits"):
        position = table.schema.names.index(name)
        table = table.set_column(position, table.schema.field(position), table[name].take(order))
    rewrite(copy, lambda _: table)
    report = verify(copy)
    assert told(report) == [("embedding", SHARD)]
    assert "2 of 28 vectors of embedding are up to" in report.findings[0].message
    assert "0.002 is allowed: '04.png'" in report.findings[0].message


def test_a_canary_that_was_tampered_with_is_told(copy: Path) -> None:
    path = copy / "canary.parquet"
    table = pq.read_table(path)
    position = table.schema.names.index("image")
    images = table["image"].to_pylist()
    pq.write_table(table.set_column(position, "image", [[images[1], *images[1:]]]), path)
    report = verify(copy, sample=1)
    assert told(report) == [("embedding", "canary.parquet")]
    assert (
        "1 of 15 inputs are not what their content_hash says: '00.png'"
        in report.findings[0].message
    )


def test_another_adapter_is_refused_and_a_missing_one_noted(
    sound: Recipe, copy: Path, tmp_path: Path
) -> None:
    other = with_untrained_adapter(changed(sound, storage={"dir": tmp_path / "other"}), seed=9)
    ours, theirs = (
        load_adapter_config(recipe.storage.adapter).fingerprint for recipe in (sound, other)
    )
    with pytest.raises(ArtifactMismatchError, match=f"{theirs}, but the data set .* {ours}"):
        verify(copy, adapters=[other.storage.adapter])
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(str(sound.storage.adapter), "/nowhere"))
    report = verify(copy)
    assert report.is_sound
    assert report.notes == [
        "there is no adapter at /nowhere, so nothing was embedded anew; give --adapter"
    ]
    report = verify(copy, adapters=[sound.storage.adapter])
    assert report.checked["embedding"] == 28
    assert report.notes == ["embedding_other not embedded anew; give --adapter for each"]


def test_the_command_checks_a_bucket_and_ends_with_1_where_something_is_wrong(
    copy: Path, object_store: str
) -> None:
    """A process of its own: this session's workers were started before they could know the bucket."""
    store = open_store(f"s3://{object_store}/embeddings")
    for path in sorted(copy.rglob("*")):
        if path.is_file():
            store.write(str(path.relative_to(copy)), path.read_bytes())
    store.remove(SHARD)
    command = [sys.executable, "-m", "jobs.cli", "verify", store.location, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1, done.stderr
    shown = json.loads(done.stdout)
    assert [(one["check"], one["place"]) for one in shown["findings"]] == [("files", SHARD)]
    assert shown["checked"]["embedding"] == 25
    assert "verify shard 4/4" in done.stderr
