"""Embedding a corpus on Ray Data: every row once, what the encoder gives, resumable, damage set aside by name."""

import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.commits import Commit
from pipelines.corpus import open_corpus, read_plan, write_plan
from pipelines.embed import REPORT, embed, require_planned_rows
from pipelines.embedding import driver
from pipelines.embedding.canary import CANARY
from pipelines.embedding.encode import EncodePieces
from pipelines.embedding.flow import PLAN, Flow
from pipelines.embedding.preflight import require_room, workers_for
from pipelines.embedding.prepare import prepare
from pipelines.embedding.sealing import Sealing, sealed
from pipelines.embedding.write import WritePieces
from pipelines.index import index
from pipelines.ledger import MANIFEST, Ledger
from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from pipelines.storage import LocalStore
from slq.arrow import ERRORS, embedding_schema
from slq.artifacts import load_adapter_config
from slq.errors import (
    ArtifactError,
    ArtifactMismatchError,
    ClusterError,
    ConfigError,
    DataError,
    HardwareError,
)
from slq.index import VectorIndex
from slq.media import decode_image
from tests.integration.runs import (
    changed,
    fingerprints_of_files,
    read_embeddings,
    with_untrained_adapter,
)

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


def folder(recipe: Recipe) -> Path:
    return Path(recipe.storage.embeddings)


def quarantine(recipe: Recipe) -> Rows:
    return [
        row
        for path in sorted((folder(recipe) / "errors").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def corpus_run(recipe: Recipe, path: Path, rows: Rows) -> Recipe:
    """A run over a Parquet corpus of these rows."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return with_untrained_adapter(changed(recipe, data={"corpus": str(path)}))


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
    root = folder(finished)
    before = fingerprints_of_files(root)
    (root / MANIFEST).unlink()
    (root / "commits" / "000002.json").unlink()
    embed(finished)
    after = fingerprints_of_files(root)
    touched = {name for name in before if before[name][0] != after[name][0]}
    assert touched == {
        MANIFEST,
        "README.md",
        CANARY,
        REPORT,
        "commits/000002.json",
        "shards/part-000002.parquet",
    }
    for name in (MANIFEST, CANARY, "shards/part-000002.parquet"):
        assert before[name][1] == after[name][1]
    assert before.keys() == after.keys()


def test_another_adapter_is_refused_and_both_fingerprints_are_named(
    finished: Recipe, tmp_path: Path
) -> None:
    old = load_adapter_config(finished.storage.adapter).fingerprint
    other = with_untrained_adapter(changed(finished, storage={"dir": tmp_path / "other"}), seed=9)
    new = load_adapter_config(other.storage.adapter).fingerprint
    (tmp_path / "other" / "embeddings").symlink_to(finished.storage.embeddings)
    before = fingerprints_of_files(folder(finished))
    with pytest.raises(ArtifactMismatchError, match=f"{old}.*{new}"):
        embed(other)
    assert fingerprints_of_files(folder(finished)) == before


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
    for path in sorted((folder(finished) / "shards").glob("*.parquet")):
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
        with pytest.raises(
            DataError, match=r"[24] of 16 items \((12\.5|25\.0)%\) were quarantined.*errors"
        ):
            embed(recipe)
        assert Ledger(recipe.storage.embeddings).manifest() is None
    embed(changed(recipe, embed={"max_error_share": 0.25}))
    assert len(stored(recipe)) == 12


def test_a_run_ends_as_soon_as_it_cannot_end_well_and_loses_no_finished_shard(
    finished: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    rows = gallery(scenes_dir)[:32]
    for row in rows[:8]:
        row["image"] = b"broken"
    settings = {"shard_rows": 8, "piece_rows": 4, "max_error_share": 0.2}
    recipe = changed(finished, storage={"dir": tmp_path / "run"}, embed=settings)
    recipe = corpus_run(recipe, tmp_path / "c.parquet", rows)
    words = (
        r"8 of 32 items \(.*\) were quarantined, more than embed.max_error_share allows \(20.0%\)"
    )
    with pytest.raises(
        DataError, match=words + f", the last one ({rows[0]['id']}|{rows[4]['id']}): .*errors"
    ):
        embed(recipe)
    commits = Ledger(recipe.storage.embeddings).commits()
    assert commits[0].quarantined == 8
    with pytest.raises(DataError, match=words + "; see .*errors"):
        embed(recipe)  # nothing of it can go well, so nothing is read
    assert Ledger(recipe.storage.embeddings).commits() == commits
    embed(changed(recipe, embed={"max_error_share": 0.25}))
    assert len(stored(recipe)) == 24
    assert Ledger(recipe.storage.embeddings).commits()[0] == commits[0]


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
    files = sorted((folder(recipe) / "shards").glob("*.parquet"))
    assert [pq.read_schema(file).field("note").type for file in files] == [pa.string()] * 2
    everything = f"{recipe.storage.embeddings}/shards/*.parquet"
    assert len(duckdb.sql(f"SELECT note FROM '{everything}'").fetchall()) == 16


def picture(path: Path, shade: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (shade, 90, 30)).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def pictures(folder: Path, count: int) -> Path:
    """A folder of pictures `00.png`, `01.png`, ..."""
    for n in range(count):
        picture(folder / "pictures" / f"{n:02d}.png", 20 * n)
    return folder / "pictures"


def test_a_folder_of_images_is_embedded_and_a_file_that_cannot_be_read_is_set_aside(
    finished: Recipe, tmp_path: Path
) -> None:
    corpus = tmp_path / "pictures"
    for n in range(12):
        picture(corpus / f"sub{n % 2}" / f"{n:02d}.png", 20 * n)
    (corpus / "sub0" / "05.png").symlink_to(tmp_path / "gone.png")
    recipe = changed(finished, storage={"dir": tmp_path / "run"}, data={"corpus": str(corpus)})
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
    recipe = changed(finished, storage={"dir": tmp_path / "run"}, resources={"embed_workers": 64})
    recipe = with_untrained_adapter(changed(recipe, embed={"shard_rows": 1}))
    with pytest.raises(
        ConfigError, match=r"embed_workers is 32, but the cluster has 4 CPUs.*at most 3"
    ):
        embed(recipe)


def room(num_cpus: float, workers: int, gpus: float = 0, **extra: float) -> None:
    recipe = changed(Recipe(), resources={"embed_workers": workers, "gpus_per_worker": gpus})
    require_room(recipe, {"CPU": num_cpus, **extra}, 1)


def test_the_rules_about_room_on_the_cluster(caplog: pytest.LogCaptureFixture) -> None:
    room(4, 3)
    room(4, 4, 1, GPU=4)  # encoders on GPUs take no CPU
    room(4, 8, 0.5, GPU=4)
    for num_cpus, workers in ((4, 4), (2, 3), (1, 1)):
        with pytest.raises(ConfigError, match="reading needs one"):
            room(num_cpus, workers)
    with pytest.raises(HardwareError, match=r"4 encoders with 1 GPUs each .* the cluster has 2"):
        room(8, 4, 1, GPU=2)
    with pytest.raises(ConfigError, match=r"piece_bytes is 67108864, but 16 .* of 512 MiB; lower"):
        room(4, 3, object_store_memory=512 * 2**20)
    require_room(Recipe(), {"CPU": 8}, 2)
    assert "2 nodes" in caplog.text
    assert "the same folder on all of them" in caplog.text


def test_encoders_without_a_piece_are_not_started(caplog: pytest.LogCaptureFixture) -> None:
    recipe = changed(Recipe(), resources={"embed_workers": 8}, embed={"piece_rows": 100})
    assert workers_for(recipe, 1000, 2) == 8
    assert caplog.text == ""
    assert workers_for(recipe, 250, 2) == 3
    assert workers_for(recipe, None, 5) == 5
    assert "only 3 of 8 encoders are started" in caplog.text


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

    lost_pieces = 0

    def __init__(self, tables: list[pa.Table]) -> None:
        self.tables = tables
        self.steps: list[tuple[Any, dict[str, Any]]] = []

    def map_batches(self, step: Any, **options: Any) -> "Recorder":
        self.steps.append((step, options))
        call: Callable[..., Any] = step
        if isinstance(step, type):
            call = step(**options["fn_constructor_kwargs"])
        found = [call(table, **options.get("fn_kwargs", {})) for table in self.tables]
        self.tables = [
            table for one in found for table in ([one] if isinstance(one, pa.Table) else one)
        ]
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for table in self.tables[self.lost_pieces :]:
            yield from table.to_pylist()


class SealingHere(Sealing):
    """Seals in this process."""

    def __init__(self, flow: Flow, workers: int) -> None:
        self._flow = flow
        self._done: list[tuple[Any, list[Any]]] = []

    def submit(self, pieces: list[Any], before: Commit | None) -> None:
        self._done.append((sealed(self._flow, pieces, before), pieces))

    def finished(self, *, wait: bool = False) -> Iterator[tuple[Commit, list[Any]]]:
        while self._done:
            found, pieces = self._done.pop(0)
            assert isinstance(found, Commit), found
            yield found, pieces


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
    monkeypatch.setattr(ray, "nodes", lambda: [{}])
    monkeypatch.setattr(driver, "Sealing", SealingHere)
    monkeypatch.setattr(driver, "start_journal", lambda: None)
    return recorders


def test_the_flow_asks_ray_for_three_stages_that_it_cannot_fuse_split_or_join(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = without_cluster(monkeypatch)
    recipe = with_untrained_adapter(changed(tiny_run, embed={"piece_rows": 3}))
    embed(recipe)
    assert len(stored(recipe)) == 32
    (prepared, encode, written) = recorders[0].steps
    assert (prepared[0], encode[0], written[0]) == (prepare, EncodePieces, WritePieces)
    assert len(recorders[0].tables) == 12  # four shards of eight rows in pieces of 3, 3 and 2
    assert all(table.num_rows == 1 for table in recorders[0].tables)
    for _, options in recorders[0].steps:
        assert (options["batch_size"], options["batch_format"]) == (None, "pyarrow")
    for (_, options), size, threads in ((encode, 2, 1), (written, 1, WritePieces.threads)):
        strategy = options["compute"]
        assert strategy.max_size == strategy.min_size == size
        assert strategy.max_concurrent_calls_per_actor == threads
    assert (encode[1]["num_cpus"], encode[1]["num_gpus"]) == (1, None)
    requests = [
        {name: one.get(name) for name in ("num_cpus", "num_gpus", "memory")}
        for _, one in recorders[0].steps
    ]
    assert requests[0] != requests[1] != requests[2]  # equal ones would be fused
    assert len(pickle.dumps(encode[1]["fn_constructor_kwargs"])) < 20_000  # no weights travel


def test_a_recipe_decides_how_many_tasks_prepare(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = without_cluster(monkeypatch)
    embed(with_untrained_adapter(changed(tiny_run, resources={"prepare_workers": 3})))
    assert recorders[0].steps[0][1]["compute"].size == 3


def test_the_schemas_of_shards_and_quarantined_rows_are_the_public_ones(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cluster(monkeypatch)
    rows = [{"id": f"{n}", "image": b"no image", "text": None} for n in range(3)]
    recipe = corpus_run(
        changed(tiny_run, embed={"max_error_share": 1.0}), tmp_path / "c.parquet", rows
    )
    embed(recipe)
    # no row is left, and the type is that of other shards
    assert pq.read_schema(folder(recipe) / "shards/part-000000.parquet").equals(
        embedding_schema(192, [])
    )
    assert pq.read_schema(folder(recipe) / "errors/part-000000.parquet").equals(ERRORS)
    assert not (folder(recipe) / CANARY).exists()


@pytest.mark.parametrize("change", ["added", "gone", "another"])
def test_a_folder_that_changes_during_the_run_fails_it_and_gets_no_manifest(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    corpus = pictures(tmp_path, 12)
    name = "00a.png" if change == "added" else "03.png"

    def meanwhile() -> None:
        if change == "gone":
            (corpus / name).unlink()
        else:
            picture(corpus / name, 255)

    without_cluster(monkeypatch, meanwhile)
    recipe = with_untrained_adapter(changed(tiny_run, data={"corpus": str(corpus)}))
    with pytest.raises(DataError, match=rf"the corpus changed while it was read: .*{name}"):
        embed(recipe)
    assert Ledger(recipe.storage.embeddings).manifest() is None


def test_a_run_over_a_corpus_that_changed_since_names_the_file(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = pictures(tmp_path, 12)
    without_cluster(monkeypatch)
    recipe = with_untrained_adapter(changed(tiny_run, data={"corpus": str(corpus)}))
    embed(recipe)
    picture(corpus / "03.png", 255)
    with pytest.raises(DataError, match=r"03\.png of shard 0 is another; .* another storage\.dir"):
        embed(recipe)
    with pytest.raises(ArtifactMismatchError, match=r"corpus_digest.*shard_rows: 8 -> 9"):
        embed(changed(recipe, embed={"shard_rows": 9}))


def test_a_corpus_that_changes_while_it_is_planned_is_never_begun_under_its_old_digest(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = pictures(tmp_path, 4)

    def slowly(*arguments: Any) -> Any:
        found = write_plan(*arguments)
        picture(corpus / "01.png", 255)
        return found

    monkeypatch.setattr("pipelines.embed.write_plan", slowly)
    without_cluster(monkeypatch)
    recipe = with_untrained_adapter(changed(tiny_run, data={"corpus": str(corpus)}))
    with pytest.raises(DataError, match="files came, went or were written to meanwhile"):
        embed(recipe)
    assert not (Path(recipe.storage.embeddings) / PLAN).exists()


def test_a_table_that_shrinks_during_the_run_fails_it_and_names_the_shard(
    tiny_run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes_dir: Path
) -> None:
    rows, corpus = gallery(scenes_dir), tmp_path / "c.parquet"
    recipe = corpus_run(tiny_run, corpus, rows)
    without_cluster(monkeypatch, lambda: pq.write_table(pa.Table.from_pylist(rows[:20]), corpus))
    with pytest.raises(DataError, match=r"corpus changed .*shard [0-3]"):
        embed(recipe)
    assert Ledger(recipe.storage.embeddings).manifest() is None


def test_a_commit_that_does_not_account_for_every_planned_row_is_refused(
    scenes_dir: Path, tmp_path: Path
) -> None:
    write_plan(open_corpus(scenes_dir / "gallery.parquet").shards(8), tmp_path / PLAN)
    plan = read_plan(LocalStore(tmp_path), PLAN)
    commits = {n: Commit(n, 7, 1, "", 0, "") for n in range(len(plan))}
    require_planned_rows(plan, commits)
    commits[2] = Commit(2, 7, 0, "", 0, "")
    with pytest.raises(DataError, match=r"changed while it was read: shard 2 has 7 rows, 8 were"):
        require_planned_rows(plan, commits)


def test_shards_that_never_came_back_are_named_and_no_manifest_claims_them(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cluster(monkeypatch)
    monkeypatch.setattr(Recorder, "lost_pieces", 2)
    recipe = with_untrained_adapter(tiny_run)
    with pytest.raises(ArtifactError, match=r"2 commit records for 4 shards, and shards \[0, 1\]"):
        embed(recipe)
    assert Ledger(recipe.storage.embeddings).manifest() is None
    monkeypatch.setattr(Recorder, "lost_pieces", 0)
    embed(recipe)
    assert len(stored(recipe)) == 32


def test_a_cluster_that_is_lost_ends_in_words(
    tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def lost(_: Any) -> Any:
        raise ray.exceptions.NodeDiedError("the node is gone\nand more")

    without_cluster(monkeypatch)
    monkeypatch.setattr(driver, "written_pieces", lost)
    with pytest.raises(
        ClusterError, match=r"^Ray gave up: .*; committed shards stay, and the same"
    ):
        embed(with_untrained_adapter(tiny_run))
