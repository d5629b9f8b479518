"""Embedding a corpus on Ray Data: every row once, what the encoder gives, resumable, damage set aside by name."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.embed import embed, read_and_decode, require_free_cpu, write_shard
from pipelines.index import index, read_embeddings
from pipelines.ledger import MANIFEST, Ledger
from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter_config
from slq.errors import ArtifactMismatchError, ConfigError, DataError
from slq.index import VectorIndex
from slq.media import decode_image
from slq.schema import ERRORS
from tests.integration.runs import changed, fingerprints_of_files, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]
FP16 = 1e-3  # half a unit in the last place of a value below one is 2.4e-4; batches add a little

Rows = list[dict[str, Any]]


def stored(recipe: Recipe) -> dict[str, NDArray[np.float32]]:
    """id -> vector of a finished data set."""
    rows, vectors, _ = read_embeddings(recipe.storage.embeddings)
    return dict(zip(rows["id"].to_pylist(), vectors, strict=True))


def gallery(folder: Path) -> Rows:
    rows: Rows = pq.read_table(folder / "gallery.parquet").to_pylist()
    return rows


def quarantine(recipe: Recipe) -> Rows:
    return [
        row
        for path in sorted((recipe.storage.embeddings / "errors").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def corpus_run(recipe: Recipe, path: Path, rows: Rows) -> Recipe:
    """A run over a Parquet corpus of these rows."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return with_untrained_adapter(changed(recipe, data={"corpus": path}))


# ---- one finished run that most tests look at ----


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embed")


@pytest.fixture
def finished(tiny_run: Recipe, storage: Path, ray_cluster: None) -> Recipe:
    """The gallery of 32 scenes in four shards; the first test that asks pays for it."""
    recipe = changed(tiny_run, storage={"dir": storage / "run"})
    if not recipe.storage.adapter.is_dir():
        with_untrained_adapter(recipe)
        embed(recipe)
    return recipe


def test_every_row_comes_out_once(finished: Recipe, scenes_dir: Path) -> None:
    rows, vectors, fingerprint = read_embeddings(finished.storage.embeddings)
    assert rows["id"].to_pylist() == [row["id"] for row in gallery(scenes_dir)]
    assert vectors.shape == (32, load_adapter_config(finished.storage.adapter).hidden_size)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert fingerprint == load_adapter_config(finished.storage.adapter).fingerprint
    assert rows["shard_id"].to_pylist() == [n // 8 for n in range(32)]
    assert rows["row_in_shard"].to_pylist() == [n % 8 for n in range(32)]
    manifest = Ledger(finished.storage.embeddings).manifest()
    assert manifest is not None
    assert (manifest["num_rows"], manifest["num_quarantined"], manifest["num_shards"]) == (32, 0, 4)


def test_vectors_are_those_of_the_encoder(finished: Recipe, scenes_dir: Path) -> None:
    images = [decode_image(row["image"]) for row in gallery(scenes_dir)]
    direct = encoder_of(finished).encode(images)
    ours = np.stack(list(stored(finished).values()))
    np.testing.assert_allclose(ours, direct, rtol=0, atol=FP16)
    assert np.abs(ours - direct[::-1]).max() > 10 * FP16


def test_a_second_run_touches_no_file(finished: Recipe) -> None:
    before = fingerprints_of_files(finished.storage.dir)
    assert embed(finished) == finished.storage.embeddings
    assert fingerprints_of_files(finished.storage.dir) == before


def test_after_losing_one_commit_record_only_that_shard_is_made_again_with_the_same_bytes(
    finished: Recipe,
) -> None:
    root = finished.storage.embeddings
    before = fingerprints_of_files(root)
    (root / MANIFEST).unlink()
    (root / "commits" / "000002.json").unlink()
    embed(finished)
    after = fingerprints_of_files(root)
    touched = {name for name in before if before[name][0] != after[name][0]}
    assert touched == {MANIFEST, "README.md", "commits/000002.json", "shards/part-000002.parquet"}
    for name in (MANIFEST, "shards/part-000002.parquet"):
        assert before[name][1] == after[name][1]
    assert before.keys() == after.keys()


def test_another_adapter_is_refused_and_both_fingerprints_are_named(
    finished: Recipe, tmp_path: Path
) -> None:
    old = load_adapter_config(finished.storage.adapter).fingerprint
    other = with_untrained_adapter(changed(finished, storage={"dir": tmp_path / "other"}), seed=9)
    new = load_adapter_config(other.storage.adapter).fingerprint
    (tmp_path / "other" / "embeddings").symlink_to(finished.storage.embeddings)
    before = fingerprints_of_files(finished.storage.embeddings)
    with pytest.raises(ArtifactMismatchError, match=f"{old}.*{new}"):
        embed(other)
    assert fingerprints_of_files(finished.storage.embeddings) == before


def test_a_data_set_is_not_continued_with_another_plan(finished: Recipe) -> None:
    with pytest.raises(ArtifactMismatchError, match="shard_rows: 8 -> 5"):
        embed(changed(finished, embed={"shard_rows": 5}))


def test_shards_open_in_duckdb(finished: Recipe) -> None:
    import duckdb

    files = f"{finished.storage.embeddings}/shards/*.parquet"
    found = duckdb.sql(
        f"SELECT id, embedding, modality FROM '{files}' ORDER BY shard_id, row_in_shard"
    ).fetchall()
    assert [row[0] for row in found] == list(stored(finished))
    norms = np.linalg.norm(np.array([row[1] for row in found], dtype=np.float32), axis=1)
    np.testing.assert_allclose(norms, 1, atol=FP16)
    assert {row[2] for row in found} == {"image"}


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_shards_open_in_data_frames(finished: Recipe, name: str) -> None:
    library = pytest.importorskip(name)
    ids: list[str] = []
    for path in sorted((finished.storage.embeddings / "shards").glob("*.parquet")):
        frame = library.read_parquet(path)
        ids += list(frame["id"])
        np.testing.assert_allclose(
            np.linalg.norm(np.array(frame["embedding"].to_list(), np.float32), axis=1), 1, atol=FP16
        )
    assert ids == list(stored(finished))


def test_an_index_of_the_data_set_finds_every_item_by_its_own_vector_and_is_made_once(
    finished: Recipe,
) -> None:
    folder = index(finished)
    found = VectorIndex(folder)
    for item_id, vector in stored(finished).items():
        assert found.search(vector[None], 1)[0][0].id == item_id
    before = fingerprints_of_files(folder)
    index(finished)
    assert fingerprints_of_files(folder) == before
    index(changed(finished, index={"kind": "ivf", "num_lists": 4}))
    assert VectorIndex(folder).version == "v000002"


# ---- damage, mixtures, limits ----


def test_bad_items_are_set_aside_by_name_and_their_neighbours_are_as_before(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    rows = gallery(scenes_dir)
    clean = stored(finished)
    rows[3]["image"] = rows[3]["image"][: len(rows[3]["image"]) // 2]
    rows[12]["image"] = b"<html>not found</html>"
    rows[13]["image"] = b""
    recipe = corpus_run(
        changed(finished, storage={"dir": tmp_path / "run"}), tmp_path / "c.parquet", rows
    )
    embed(recipe)
    assert {row["id"]: row["error"] for row in quarantine(recipe)} == {
        rows[3]["id"]: "corrupt",
        rows[12]["id"]: "unknown_format",
        rows[13]["id"]: "empty",
    }
    assert all(
        row["message"] and row["uri"] and row["stage"] == "decode" for row in quarantine(recipe)
    )
    ours = stored(recipe)
    assert list(ours) == [row["id"] for n, row in enumerate(rows) if n not in (3, 12, 13)]
    for item_id, vector in ours.items():
        np.testing.assert_allclose(vector, clean[item_id], rtol=0, atol=FP16)
    manifest = Ledger(recipe.storage.embeddings).manifest()
    assert manifest is not None
    assert (manifest["num_rows"], manifest["num_quarantined"]) == (29, 3)


def test_a_shard_without_any_good_item_does_not_spoil_the_data_set(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    rows = gallery(scenes_dir)[:16]
    for row in rows[8:]:
        row["image"] = b"broken"
    recipe = changed(finished, storage={"dir": tmp_path / "run"}, embed={"max_error_share": 0.6})
    recipe = corpus_run(recipe, tmp_path / "c.parquet", rows)
    embed(recipe)
    assert list(stored(recipe)) == [row["id"] for row in rows[:8]]
    assert len(VectorIndex(index(recipe))) == 8


def test_too_many_bad_items_fail_the_run_each_time_and_say_where_they_are(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    rows = gallery(scenes_dir)[:16]
    for row in rows[::4]:
        row["image"] = b"broken"
    recipe = corpus_run(
        changed(finished, storage={"dir": tmp_path / "run"}), tmp_path / "c.parquet", rows
    )
    for _ in range(2):
        with pytest.raises(DataError, match=r"4 of 16 items \(25\.0%\) were quarantined.*errors"):
            embed(recipe)
        assert Ledger(recipe.storage.embeddings).manifest() is None
    embed(changed(recipe, embed={"max_error_share": 0.25}))
    assert len(stored(recipe)) == 12


def test_texts_images_and_both_stand_in_one_corpus_with_their_own_columns(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    image = gallery(scenes_dir)[0]["image"]
    kinds: Rows = [
        {"image": image, "text": None},
        {"image": None, "text": "a red dog"},
        {"image": image, "text": "a red dog"},
    ]
    rows = [
        {
            "id": f"i{n}",
            **kinds[n % 3],
            "price": n / 2,
            "note": None if n < 8 else f"n{n}",
            "tags": ["a"] * (n % 3),
        }
        for n in range(16)
    ]
    recipe = corpus_run(
        changed(finished, storage={"dir": tmp_path / "run"}), tmp_path / "c.parquet", rows
    )
    embed(recipe)
    found, vectors, _ = read_embeddings(recipe.storage.embeddings)
    assert found["modality"].to_pylist() == [
        ("image", "text", "image+text")[n % 3] for n in range(16)
    ]
    for name in ("price", "note", "tags"):
        assert found[name].to_pylist() == [row[name] for row in rows]
    np.testing.assert_allclose(vectors[:3], vectors[3:6], atol=FP16)
    direct = encoder_of(recipe).encode(
        [{"image": image}, "a red dog", {"image": image, "text": "a red dog"}]
    )
    np.testing.assert_allclose(vectors[:3], direct, rtol=0, atol=FP16)


def test_a_column_that_is_null_in_one_shard_keeps_its_type_in_every_shard(
    finished: Recipe, tmp_path: Path
) -> None:
    import duckdb

    rows = [
        {"id": f"i{n}", "text": f"a dog {n}", "note": None if n < 8 else f"n{n}"} for n in range(16)
    ]
    recipe = corpus_run(
        changed(finished, storage={"dir": tmp_path / "run"}), tmp_path / "c.parquet", rows
    )
    embed(recipe)
    files = sorted((recipe.storage.embeddings / "shards").glob("*.parquet"))
    assert [pq.read_schema(file).field("note").type for file in files] == [pa.string()] * 2
    folder = f"{recipe.storage.embeddings}/shards/*.parquet"
    assert len(duckdb.sql(f"SELECT note FROM '{folder}'").fetchall()) == 16


def picture(path: Path, shade: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 90, 30)).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def test_a_folder_of_images_is_embedded_and_a_file_that_cannot_be_read_is_set_aside(
    finished: Recipe, tmp_path: Path
) -> None:
    corpus = tmp_path / "pictures"
    for n in range(12):
        picture(corpus / f"sub{n % 2}" / f"{n:02d}.png", 20 * n)
    (corpus / "sub0" / "05.png").symlink_to(tmp_path / "gone.png")
    recipe = changed(finished, storage={"dir": tmp_path / "run"}, data={"corpus": corpus})
    recipe = with_untrained_adapter(recipe)
    embed(recipe)
    assert sorted(stored(recipe)) == sorted(f"sub{n % 2}/{n:02d}.png" for n in range(12))
    assert [row["id"] for row in quarantine(recipe)] == ["sub0/05.png"]


def test_a_picture_named_by_a_table_that_is_missing_is_set_aside(
    finished: Recipe, tmp_path: Path
) -> None:
    for n in range(12):
        picture(tmp_path / f"{n:02d}.png", 20 * n)
    (tmp_path / "05.png").unlink()
    rows = [{"id": f"i{n}", "uri": f"{n:02d}.png"} for n in range(12)]
    recipe = corpus_run(
        changed(finished, storage={"dir": tmp_path / "run"}), tmp_path / "c.parquet", rows
    )
    embed(recipe)
    assert list(stored(recipe)) == [f"i{n}" for n in range(12) if n != 5]
    assert [row["id"] for row in quarantine(recipe)] == ["i5"]


def test_actors_that_would_hold_every_cpu_are_refused_before_anything_starts(
    finished: Recipe, tmp_path: Path
) -> None:
    recipe = changed(
        finished,
        storage={"dir": tmp_path / "run"},
        resources={"embed_workers": 64},
        embed={"shard_rows": 1},
    )
    with_untrained_adapter(recipe)
    with pytest.raises(
        ConfigError, match=r"embed_workers is 32, but the cluster has 4 CPUs.*at most 3"
    ):
        embed(recipe)


def test_the_rule_about_free_cpus() -> None:
    require_free_cpu(4, 3, 0)
    require_free_cpu(4, 4, 1)  # encoders on GPUs take no CPU
    for num_cpus, workers in ((4, 4), (2, 3), (1, 1)):
        with pytest.raises(ConfigError, match="reading needs one"):
            require_free_cpu(num_cpus, workers, 0)


def test_an_adapter_that_the_recipe_cannot_reproduce_is_refused_in_words(
    finished: Recipe, tmp_path: Path
) -> None:
    """Another weight type is another embedding space; only the actors find out."""
    recipe = with_untrained_adapter(changed(finished, storage={"dir": tmp_path / "run"}))
    old = load_adapter_config(recipe.storage.adapter).fingerprint
    with pytest.raises(ArtifactMismatchError, match=f"{old}.*backbone name, revision and dtype"):
        embed(changed(recipe, backbone={"dtype": "bfloat16"}))


# ---- the wiring, without a cluster ----


class Recorder:
    """Stands for a Ray data set: keeps how each step was asked for, and runs the steps in this process."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self.tables = tables
        self.steps: list[tuple[Any, dict[str, Any]]] = []

    def map_batches(self, step: Any, **options: Any) -> "Recorder":
        self.steps.append((step, options))
        call: Callable[..., pa.Table] = step
        if isinstance(step, type):
            call = step(**options["fn_constructor_kwargs"])
        self.tables = [call(table, **options.get("fn_kwargs", {})) for table in self.tables]
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for table in self.tables:
            yield from table.to_pylist()


def test_the_flow_asks_ray_for_one_block_per_shard_and_one_cpu_per_encoder(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    recorders: list[Recorder] = []

    def from_items(items: Rows, *, override_num_blocks: int) -> Recorder:
        assert override_num_blocks == len(items) == 4
        recorders.append(Recorder([pa.Table.from_pylist([item]) for item in items]))
        return recorders[-1]

    monkeypatch.setattr(ray.data, "from_items", from_items)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    recipe = with_untrained_adapter(tiny_run)
    embed(recipe)
    assert len(stored(recipe)) == 32
    (read, encode, write) = recorders[0].steps
    assert (read[0], write[0]) == (read_and_decode, write_shard)
    for _, options in recorders[0].steps:
        assert options["batch_size"] is None  # a whole block, so a whole shard
        assert options["batch_format"] == "pyarrow"
    assert encode[1]["compute"].max_size == encode[1]["compute"].min_size == 2
    assert (encode[1]["num_cpus"], encode[1]["num_gpus"]) == (1, None)
    assert len(repr(encode[1]["fn_constructor_kwargs"])) < 10_000  # settings travel, weights do not


def test_the_schema_of_quarantined_rows_is_the_public_one(finished: Recipe, tmp_path: Path) -> None:
    Ledger(tmp_path).begin({})
    row = {"shard_id": 0, "row": 0, "id": "a", "uri": "u", "error": "corrupt", "message": "m"}
    table = pa.Table.from_pylist([{**row, "columns": b"", "vector": None}])
    write_shard(table, str(tmp_path))
    assert pq.read_schema(Ledger(tmp_path).errors_path(0)).equals(ERRORS)
