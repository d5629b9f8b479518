"""Parts of a step that are kept: given back bit for bit, and only for as long as nothing has changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation_parts import _FIELDS, _made, _readings
from pipelines.kept_parts import KeptParts, content_digest
from slq.errors import StorageError
from slq.reranking.profiles import Reading
from slq.schema import Item

IDENTITY = {"model": "m", "content": "c"}


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.random((3, 4), np.float32).T, "b": np.array([np.nan, -np.inf])}
    KeptParts(tmp_path / "parts", IDENTITY).put(7, arrays)
    found = KeptParts(tmp_path / "parts", dict(reversed(IDENTITY.items()))).get(7)
    assert found is not None
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part-007.safetensors"]


def test_what_is_missing_damaged_or_of_something_else_is_not_there(tmp_path: Path) -> None:
    kept = KeptParts(tmp_path, IDENTITY)
    assert kept.get(0) is None
    kept.put(0, {"a": np.ones(3)})
    assert KeptParts(tmp_path, {**IDENTITY, "model": "n"}).get(0) is None
    path = tmp_path / "part-000.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert kept.get(0) is None
    path.write_bytes(b"")
    assert kept.get(0) is None


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="free space or choose another folder"):
        KeptParts(tmp_path / "file", IDENTITY).put(0, {"a": np.ones(1)})


@pytest.mark.parametrize(
    "other",
    [
        [Item(text="one", id="a"), Item(text="three", id="b")],
        [Item(text="one", id="a"), Item(text="two", id="c")],
        [Item(text="two", id="b"), Item(text="one", id="a")],
        [Item(text="one", id="a"), Item(text="two", id="b", image=Image.new("RGB", (2, 2)))],
    ],
)
def test_the_digest_tells_other_ids_texts_images_and_orders(other: list[Item]) -> None:
    items = [Item(text="one", id="a"), Item(text="two", id="b")]
    assert content_digest(items) == content_digest([*items])
    assert content_digest(items) != content_digest(other)
    assert content_digest(items, []) != content_digest([], items)
    black, white = (Item(id="a", image=Image.new("RGB", (2, 2), c)) for c in ("black", "white"))
    assert content_digest([black]) != content_digest([white])


def test_only_parts_that_are_missing_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[int] = []

    def begin(number: int) -> tuple[int, dict[str, Any]]:
        begun.append(number)
        return number, {"a": np.full(2, number)}

    def collected(tasks: list[Any], what: str, keep: Any) -> None:
        for task in reversed(tasks):  # as they come
            keep(task)

    monkeypatch.setattr("pipelines.evaluation_parts.collect", collected)
    kept = KeptParts(tmp_path, IDENTITY)
    kept.put(1, {"a": np.full(2, 1)})
    found = _made(kept, 3, begin, "step part")
    assert begun == [0, 2]
    assert [part["a"].tolist() for part in found] == [[0, 0], [1, 1], [2, 2]]
    assert "step part: 1 of 3 are there already" in capsys.readouterr().err
    begun.clear()
    _made(kept, 3, begin, "step part")
    assert begun == []


def test_readings_are_told_and_read_back() -> None:
    for reading in (
        Reading(1.5),
        Reading(-0.25, 0.5, 1.25, 37, None),
        Reading(2.0, None, None, None, -1.0),
        Reading(float("-inf"), 0.0, 0.0, 0, 0.0),
    ):
        row = [np.nan if (value := getattr(reading, name)) is None else value for name in _FIELDS]
        assert _readings(np.array(row, np.float64).tolist()) == reading
    assert isinstance(_readings([0.0, 0.0, 0.0, 41.0, np.nan]).hundredths, int)
