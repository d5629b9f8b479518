"""Which engine holds an index, as recipes say it: defaults, what does not fit together, no credentials."""

from pathlib import Path

import pytest
import yaml

from pipelines.recipe import Recipe, load_recipe
from slq.engines import IndexPlace, IndexSettings
from slq.errors import ConfigError
from slq.index import IndexConfig
from tests.unit.engine_data import place, written
from tests.unit.index_data import published, stored
from tests.unit.test_cli import refusal, slq
from tests.unit.test_indexing import ids_of


def recipe_file(folder: Path, **index: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"storage": {"dir": str(folder / "run")}, "index": index}))
    return path


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({}, "{run}/index"),
        ({"kind": "ivf"}, "{run}/index"),
        ({"engine": "lance"}, "lance table {run}/index/lance/slq.lance"),
        ({"engine": "milvus"}, "milvus collection slq of {run}/index/milvus.db"),
        (
            {"engine": "qdrant", "collection": "b"},
            "qdrant collection b of {run}/index/qdrant",
        ),
        (
            {"engine": "milvus", "target": "http://db:19530"},
            "milvus collection slq of http://db:19530",
        ),
        ({"engine": "lance", "target": "s3://b/p/"}, "lance table s3://b/p/slq.lance"),
    ],
)
def test_an_index_is_where_the_recipe_says(
    tmp_path: Path, index: dict[str, str], expected: str
) -> None:
    recipe = load_recipe(recipe_file(tmp_path, **index))
    assert str(recipe.index_place) == expected.format(run=recipe.storage.dir)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_folder_is_absolute_for_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(recipe_file(tmp_path, engine="lance", target="tables"))
    assert recipe.index.target == str(tmp_path.resolve() / "tables")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"engine": "vespa"}, "index.engine: Input should be 'faiss', 'lance', 'milvus' or 'qdrant'"),
        ({"target": "x"}, "target is a place in another engine, and engine is faiss"),
        (
            {"engine": "lance", "kind": "ivf", "goal": {}},
            "goal, kind say how faiss builds an index, and engine is lance; leave them out",
        ),
        ({"engine": "milvus", "target": "x"}, r"a file of Milvus Lite ends in \.db, and that of x"),
        ({"engine": "lance", "collection": "../x"}, "index.collection: String should match"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, index: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(tmp_path, **index))


def test_credentials_in_a_recipe_are_refused_and_shown_nowhere(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, engine="qdrant", target="https://me:hunter2@db:6333")
    text = refusal("index", path, "--dry-run")
    assert "an address holds no user, password or query" in text
    assert "leave it out and set QDRANT_API_KEY" in text
    assert "hunter2" not in text
    target = "http://root:hunter2@db:19530"
    for others in ({}, {"engine": "milvus", "kind": "ivf"}):  # whatever else is wrong
        text = refusal("index", recipe_file(tmp_path, target=target, **others))
        assert "an address holds no user" in text
        assert "hunter2" not in text
    text = refusal("export", recipe_file(tmp_path), "--to", "milvus", "--target", target)
    assert "set MILVUS_TOKEN" in text
    assert "hunter2" not in text


def test_files_of_ours_depend_on_no_other_engine() -> None:
    settings = IndexSettings(kind="ivf", num_lists=9)
    assert settings.own == IndexConfig(kind="ivf", num_lists=9)
    assert type(settings.own) is IndexConfig


def test_changes_of_versions_are_refused_where_another_engine_holds_them(tmp_path: Path) -> None:
    from jobs.indexing import change_of

    recipe = load_recipe(recipe_file(tmp_path, engine="lance"))
    (tmp_path / "ids.txt").write_text("item-1\n")
    for name, flow in {
        "--append": change_of("x", None, compact=False),
        "--delete": change_of(None, tmp_path / "ids.txt", compact=False),
        "--compact": change_of(None, None, compact=True),
    }.items():
        with pytest.raises(ConfigError, match=f"{name} changes an index of faiss, and index.en"):
            flow(recipe)


@pytest.mark.parametrize("kind", ["faiss", "lance", "milvus", "qdrant"])
def test_the_index_of_a_recipe_is_searched_on_the_command_line(tmp_path: Path, kind: str) -> None:
    if kind == "faiss":
        published(tmp_path / "run" / "index")
        path = recipe_file(tmp_path)
    else:
        there = written(kind, tmp_path)
        path = recipe_file(tmp_path, engine=kind, target=there.target, collection="corpus")
    similarity = stored() @ stored()[7]
    nearest = [f"item-{n}" for n in (-similarity).argsort() if n != 7 and n % 10 < 3]
    options = ("--like", "item-7", "--where", "price < 3", "--top-k", "4")
    assert ids_of("--recipe", path, *options) == nearest[:4]
    assert ids_of("--recipe", path, *options, "--exclude", nearest[1])[1] == nearest[2]
    text = refusal("search", "--recipe", path, "--like", "x")
    assert "DataError: the index holds no item 'x'" in text
    text = refusal("search", "--recipe", path, "--like", "item-7", "--where", "prize < 3")
    assert "columns are id, text, price, content_hash" in text.replace("\n", " ")


def test_an_index_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, engine="lance")
    text = refusal("search", "--recipe", path, "--like", "x")
    assert "ArtifactError: there is no table" in text
    assert "write it with `slq index`" in text
    other = place("lance", tmp_path)
    overrides = ("--set", f"index.target={other.target}", "--set", "index.collection=corpus")
    assert other.uri in refusal("search", "--recipe", path, *overrides, "--like", "x")


def test_plain_arrays_are_no_place_to_search() -> None:
    with pytest.raises(ConfigError, match="npy answers no queries"):
        IndexPlace("npy", "x", "y", Path("z")).open()


def test_a_dry_run_shows_the_engine(tmp_path: Path) -> None:
    result = slq("index", recipe_file(tmp_path, engine="qdrant"), "--dry-run", "--json")
    assert result.exit_code == 0
    assert '"engine": "qdrant"' in result.stdout
