"""Index folders on the command line: versions, going back, neighbours of an item, filters."""

import json
from pathlib import Path

import pytest

from jobs.indexing import change_of
from slq.errors import ConfigError
from slq.index import current_version, delete
from tests.unit.index_data import COUNT, IVF, published
from tests.unit.test_cli import refusal, slq


def ids_of(*arguments: str | Path) -> list[str]:
    result = slq("search", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [one["id"] for one in json.loads(result.stdout)["results"]]


def test_versions_are_shown_taken_back_and_removed(tmp_path: Path) -> None:
    published(tmp_path)
    delete(tmp_path, ["item-1", "item-2"])
    published(tmp_path, IVF)
    text = slq("versions", tmp_path).stdout
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:3] == ["version", "vectors", "deleted"]
    assert [line[0] for line in lines[1:]] == ["v000001", "v000002", "v000003"]
    assert lines[2][1:4] == ["398", "2", "1"]
    assert lines[3][1:3] == ["current", "400"]
    found = json.loads(slq("versions", tmp_path, "--rollback", "previous", "--json").stdout)
    assert [one["current"] for one in found] == [False, True, False]
    assert current_version(tmp_path) == "v000002"
    found = json.loads(slq("versions", tmp_path, "--keep", "1", "--json").stdout)
    assert [one["version"] for one in found] == ["v000002", "v000003"]
    text = refusal("versions", tmp_path, "--rollback", "v000009")
    assert "has no v000009; it has v000002, v000003" in text
    assert "holds no index; build one" in refusal("versions", tmp_path / "none")


def test_items_like_one_of_the_index_need_no_model(tmp_path: Path) -> None:
    index = published(tmp_path)
    expected = [hit.id for hit in index.more_like("item-7", 5)]
    assert ids_of("--index", tmp_path, "--like", "item-7") == expected
    assert (
        ids_of("--index", tmp_path, "--like", "item-7", "--exclude", expected[0])[0] == expected[1]
    )
    options = ("--where", "price < 2", "--distinct", "--exact", "--top-k", "20")
    found = ids_of("--index", tmp_path, "--like", "item-7", *options)
    prices = [int(name.removeprefix("item-")) % 10 for name in found]
    assert len(found) == 20
    assert set(prices) <= {0, 1}
    text = refusal("search", "--index", tmp_path, "--like", "item-7", "--where", "prize < 2")
    assert "DataError: the filter 'prize < 2' cannot be used" in text
    assert "columns are id, text, price, content_hash" in text.replace("\n", " ")
    assert "the index holds no item 'x'" in refusal("search", "--index", tmp_path, "--like", "x")


def test_options_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    published(tmp_path)
    text = refusal("search", "a fox", "--index", tmp_path, "--like", "item-7")
    assert "give --like, or a text and an image, not both" in text
    text = refusal("search", "a fox", "--url", "http://127.0.0.1:1", "--where", "true")
    assert "--exact and --hybrid search an index: give --index or --recipe" in text
    text = refusal("search", "a fox", "--url", "http://127.0.0.1:1", "--like", "item-7")
    assert "give --like, or a text and an image, not both" in text
    text = refusal("search", "a fox", "--index", tmp_path, "--url", "http://127.0.0.1:1")
    assert "give exactly one of --url, --index and --recipe" in text
    text = refusal("search", "a fox", "--index", tmp_path, "--set", "index.engine=lance")
    assert "--set changes keys of a recipe: give --recipe" in text
    text = refusal("search", "--index", tmp_path, "--like", "item-7", "--hybrid")
    assert "--hybrid ranks by the words of a text: give one" in text
    (tmp_path / "ids.txt").write_text("item-1\n")
    with pytest.raises(ConfigError, match="at most one of --append, --delete and --compact"):
        change_of("x", tmp_path / "ids.txt", compact=False)
    with pytest.raises(ConfigError, match=r"--delete .*none\.txt: cannot be read as text"):
        change_of(None, tmp_path / "none.txt", compact=False)


def test_a_change_is_the_flow_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("item-1\n\nitem-2\nitem-1\n")
    from pipelines.recipe import Recipe

    recipe = Recipe()
    recipe = recipe.model_copy(
        update={"storage": recipe.storage.model_copy(update={"dir": tmp_path})}
    )
    published(tmp_path / "index")
    change_of(None, tmp_path / "ids.txt", compact=False)(recipe)
    found = json.loads(slq("versions", tmp_path / "index", "--json").stdout)
    assert [one["vectors"] for one in found] == [COUNT, COUNT - 2]
    change_of(None, None, compact=True)(recipe)
    found = json.loads(slq("versions", tmp_path / "index", "--json").stdout)
    assert (found[-1]["vectors"], found[-1]["deleted"]) == (COUNT - 2, 0)
