"""Embedding a corpus on Ray Data: every row once, what the encoder gives, resumable, damage set aside by name."""

import importlib
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

from pipelines.corpus import plan_shards
from pipelines.embed import (
    EncodeShard,
    embed,
    read_and_check,
    require_free_cpu,
    require_planned_rows,
    write_shard,
)
from pipelines.index import index, read_embeddings
from pipelines.ledger import MANIFEST, Commit, Ledger
from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from slq.arrow import ERRORS, embedding_schema
from slq.artifacts import load_adapter_config
from slq.encoder import Encoder
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError
from slq.index import VectorIndex
from slq.media import decode_image
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
    library = importlib.import_module(name)
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


def test_a_picture_with_a_blank_caption_is_a_picture(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    image = gallery(scenes_dir)[0]["image"]
    rows = [{"id": f"{n}", "image": image, "text": text} for n, text in enumerate((None, " ", ""))]
    recipe = corpus_run(
        changed(finished, storage={"dir": tmp_path / "run"}), tmp_path / "c.parquet", rows
    )
    embed(recipe)
    found, vectors, _ = read_embeddings(recipe.storage.embeddings)
    assert found["modality"].to_pylist() == ["image"] * 3
    np.testing.assert_allclose(vectors, vectors[:1].repeat(3, axis=0), rtol=0, atol=FP16)
    assert quarantine(recipe) == []


def test_a_path_out_of_the_corpus_folder_is_quarantined_and_bytes_win_over_a_path(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    image = gallery(scenes_dir)[0]["image"]
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret.png").write_bytes(image)
    rows = [
        {"id": "both", "image": image, "uri": str(tmp_path / "secret.png")},
        {"id": "up", "image": None, "uri": "../secret.png"},
    ]
    corpus = tmp_path / "inner" / "c.parquet"
    settings = changed(finished, storage={"dir": tmp_path / "run"}, embed={"max_error_share": 0.5})
    recipe = corpus_run(settings, corpus, rows)
    embed(recipe)
    found, _, _ = read_embeddings(recipe.storage.embeddings)
    assert found["uri"].to_pylist() == [f"{corpus}#row=0"]
    (bad,) = quarantine(recipe)
    assert (bad["id"], bad["error"], bad["uri"]) == ("up", "path_refused", f"{corpus}#row=1")


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

    lost_shards = 0

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
        for table in self.tables[self.lost_shards :]:
            yield from table.to_pylist()


def without_cluster(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None] = lambda: None
) -> list[Recorder]:
    """Let `embed` run in this process; `meanwhile` happens after the plan and before anything is read."""
    import ray

    recorders: list[Recorder] = []

    def from_items(items: Rows, *, override_num_blocks: int) -> Recorder:
        assert override_num_blocks == len(items)
        recorders.append(Recorder([pa.Table.from_pylist([item]) for item in items]))
        meanwhile()
        return recorders[-1]

    monkeypatch.setattr(ray.data, "from_items", from_items)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    return recorders


def test_the_flow_asks_ray_for_one_block_per_shard_and_one_cpu_per_encoder(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = without_cluster(monkeypatch)
    recipe = with_untrained_adapter(tiny_run)
    embed(recipe)
    assert len(stored(recipe)) == 32
    assert len(recorders[0].tables) == 4
    (read, encode, write) = recorders[0].steps
    assert (read[0], write[0]) == (read_and_check, write_shard)
    for _, options in recorders[0].steps:
        assert options["batch_size"] is None  # a whole block, so a whole shard
        assert options["batch_format"] == "pyarrow"
    assert encode[1]["compute"].max_size == encode[1]["compute"].min_size == 2
    assert (encode[1]["num_cpus"], encode[1]["num_gpus"]) == (1, None)
    assert len(repr(encode[1]["fn_constructor_kwargs"])) < 10_000  # settings travel, weights do not


def test_the_schema_of_quarantined_rows_is_the_public_one(finished: Recipe, tmp_path: Path) -> None:
    Ledger(tmp_path).begin({})
    row = {"shard_id": 0, "row": 0, "id": "a", "uri": "u", "error": "corrupt", "message": "m"}
    row["stage"] = "decode"
    table = pa.Table.from_pylist([{**row, "columns": b"", "vector": None}])
    (record,) = write_shard(table, str(tmp_path), 192).to_pylist()
    Ledger(tmp_path).commit(Commit(**record))
    shard = pq.read_schema(Ledger(tmp_path).shard_path(0))
    assert shard.equals(
        embedding_schema(192, [])
    )  # no row is left, and the type is that of other shards
    assert pq.read_schema(Ledger(tmp_path).errors_path(0)).equals(ERRORS)


@pytest.mark.parametrize("change", ["added", "gone", "another"])
def test_a_folder_that_changes_during_the_run_fails_it_and_gets_no_manifest(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    corpus = tmp_path / "pictures"
    for n in range(12):
        picture(corpus / f"{n:02d}.png", 20 * n)
    name = "00a.png" if change == "added" else "03.png"

    def meanwhile() -> None:
        if change == "gone":
            (corpus / name).unlink()
        else:
            picture(corpus / name, 255)

    without_cluster(monkeypatch, meanwhile)
    recipe = with_untrained_adapter(changed(tiny_run, data={"corpus": corpus}))
    with pytest.raises(DataError, match=f"the corpus changed while it was read: {name} of .*shard"):
        embed(recipe)
    assert Ledger(recipe.storage.embeddings).manifest() is None


def test_a_table_that_shrinks_during_the_run_fails_it_and_names_the_shard(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes_dir: Path
) -> None:
    rows, corpus = gallery(scenes_dir), tmp_path / "c.parquet"
    recipe = corpus_run(tiny_run, corpus, rows)
    without_cluster(monkeypatch, lambda: pq.write_table(pa.Table.from_pylist(rows[:20]), corpus))
    with pytest.raises(DataError, match=r"corpus changed .*: shard 2 has 4 rows, 8 were planned"):
        embed(recipe)
    assert Ledger(recipe.storage.embeddings).manifest() is None


def test_a_commit_that_does_not_account_for_every_planned_row_is_refused(scenes_dir: Path) -> None:
    plans = plan_shards(scenes_dir / "gallery.parquet", 8)
    commits = {p.shard_id: Commit(p.shard_id, 7, 1, "", 0, "") for p in plans}
    require_planned_rows(plans, commits)
    commits[2] = Commit(2, 7, 0, "", 0, "")
    with pytest.raises(DataError, match=r"changed while it was read: shard 2 has 7 rows, 8 were"):
        require_planned_rows(plans, commits)


def test_shards_that_never_came_back_are_named_and_no_manifest_claims_them(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cluster(monkeypatch)
    monkeypatch.setattr(Recorder, "lost_shards", 2)
    recipe = with_untrained_adapter(tiny_run)
    with pytest.raises(ArtifactError, match=r"2 commit records for 4 shards, and shards \[0, 1\]"):
        embed(recipe)
    assert Ledger(recipe.storage.embeddings).manifest() is None
    monkeypatch.setattr(Recorder, "lost_shards", 0)
    embed(recipe)
    assert len(stored(recipe)) == 32


# ---- the stages by themselves ----


def plan_table(corpus: Path) -> pa.Table:
    (plan,) = plan_shards(corpus, 1_000)
    row = {"shard_id": 0, "source": plan.source, "start": plan.start, "stop": plan.stop}
    return pa.Table.from_pylist([{**row, "paths": list(plan.paths)}])


def encoder_stage(recipe: Recipe) -> EncodeShard:
    fingerprint = load_adapter_config(recipe.storage.adapter).fingerprint
    return EncodeShard(recipe.model_dump(mode="json"), fingerprint)


def test_images_travel_as_their_encoded_bytes(tmp_path: Path) -> None:
    for n in range(8):
        Image.new("RGB", (2_000, 2_000), (n, 0, 0)).save(tmp_path / f"{n}.png")
    encoded = sum(path.stat().st_size for path in tmp_path.iterdir())
    table = read_and_check(plan_table(tmp_path))
    assert table["id"].to_pylist() == [f"{n}.png" for n in range(8)]
    assert table.nbytes < encoded + 10_000  # raw RGB would be 96 MB


def test_an_encoder_holds_the_pixels_of_one_batch_at_a_time(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.embed as flow

    for n in range(20):
        picture(tmp_path / "c" / f"{n:02d}.png", 12 * n)
    stage = encoder_stage(with_untrained_adapter(tiny_run))
    waiting, most = [0], [0]

    def counted(data: bytes) -> Image.Image:
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        return decode_image(data)

    genuine = Encoder.encode

    def encode(self: Encoder, inputs: Any, **options: Any) -> NDArray[np.float32]:
        waiting[0] -= len(inputs)
        return genuine(self, inputs, **options)

    monkeypatch.setattr(flow, "decode_image", counted)
    monkeypatch.setattr(Encoder, "encode", encode)
    rows = stage(read_and_check(plan_table(tmp_path / "c"))).to_pylist()
    assert most[0] == tiny_run.embed.batch_size == 8
    assert [row["id"] for row in rows] == [f"{n:02d}.png" for n in range(20)]
    assert {(row["width"], row["height"], row["error"]) for row in rows} == {(24, 24, None)}


def refusing(monkeypatch: pytest.MonkeyPatch, refused: Callable[[Any], bool]) -> None:
    """The real encoder, but for a model that raises on some items."""
    genuine = Encoder.encode_items

    def encode_items(self: Encoder, items: Any) -> Any:
        if any(refused(item) for item in items):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return genuine(self, items)

    monkeypatch.setattr(Encoder, "encode_items", encode_items)


def test_a_row_that_the_model_refuses_is_set_aside_and_its_neighbours_are_encoded(
    tiny_run: Recipe, scenes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = encoder_stage(with_untrained_adapter(tiny_run))
    table = read_and_check(plan_table(scenes_dir / "gallery.parquet"))
    clean = stage(table).to_pylist()
    guilty = {clean[3]["id"], clean[17]["id"]}
    refusing(monkeypatch, lambda item: item.id in guilty)
    found = stage(table).to_pylist()
    for row, before in zip(found, clean, strict=True):
        assert row["id"] == before["id"]
        if row["id"] in guilty:
            assert (row["error"], row["stage"], row["vector"]) == ("model_refused", "encode", None)
            assert "aspect ratio" in row["message"]
        else:
            ours, theirs = (np.frombuffer(r["vector"], np.float16) for r in (row, before))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=FP16)
    assert stage(table).to_pylist() == found  # a resumed run gives the same bytes


def test_a_model_that_refuses_everything_stops_the_run_instead_of_emptying_it(
    tiny_run: Recipe, scenes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = encoder_stage(with_untrained_adapter(tiny_run))
    table = read_and_check(plan_table(scenes_dir / "gallery.parquet"))
    refusing(monkeypatch, lambda item: True)
    with pytest.raises(ValueError, match="aspect ratio"):
        stage(table)


def test_memory_that_ran_out_is_no_rows_fault(
    tiny_run: Recipe, scenes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def no_memory(self: Encoder, items: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage = encoder_stage(with_untrained_adapter(tiny_run))
    monkeypatch.setattr(Encoder, "encode_items", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        stage(read_and_check(plan_table(scenes_dir / "gallery.parquet")))
