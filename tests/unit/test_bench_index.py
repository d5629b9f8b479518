"""What `slq bench index` measures on: one set however it is cut, with queries that are not distributed as it is."""

from pathlib import Path

import numpy as np
import pytest

from jobs.bench.index import data as data_module
from jobs.bench.index import fastest
from jobs.bench.index.build import content_of
from jobs.bench.index.curve import write_curve
from jobs.bench.index.data import ShiftedSet
from slq.index.parts import matrix

COUNT, DIMENSION = 500, 128


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "BATCH_ROWS", 64)


def test_the_set_is_the_same_whole_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.bench.index.build.BATCH_ROWS", 64)
    data = ShiftedSet(COUNT, DIMENSION)
    whole = np.concatenate(list(data.images()))
    assert whole.shape == (COUNT, DIMENSION)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    content = content_of(data)
    assert content.num_rows == COUNT
    tables = [table for part in content.sources for table in part.tables()]
    ids = [name for table in tables for name in table["id"].to_pylist()]
    assert ids == [f"i{n}" for n in range(COUNT)]
    stored = np.concatenate([matrix(table["embedding"]) for table in tables])
    np.testing.assert_array_equal(stored, whole.astype(np.float16))
    np.testing.assert_array_equal(data.texts(9), ShiftedSet(COUNT, DIMENSION).texts(9))


def test_texts_lie_apart_from_images_yet_have_neighbours_among_them() -> None:
    data = ShiftedSet(2000, DIMENSION)
    images, texts = np.concatenate(list(data.images())), data.texts(200)
    of_images = np.sort(images[:200] @ images.T, axis=1)[:, -2]  # the nearest but itself
    of_texts = np.sort(texts @ images.T, axis=1)[:, -1]
    assert of_texts.mean() < of_images.mean() - 0.1  # at the edge
    assert of_texts.mean() > (texts @ images.T).mean() + 0.2  # but not anywhere
    gap = images.mean(axis=0) - texts.mean(axis=0)
    gap /= np.linalg.norm(gap)
    assert (images @ gap).min() > (texts @ gap).mean()


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    points = [
        {"side": side, "recall": share, "qps": rate}
        for side, share, rate in [
            ("flat", 1.0, 90.0),
            ("hnswlib", 0.9, 2000.0),
            ("hnswlib", 0.97, 900.0),
            ("pq4 opq", 0.96, 1500.0),
        ]
    ]
    found = {
        "rows": 200_000,
        "dimension": 896,
        "queries": 1000,
        "threads": {"1": {"points": points}, "2": {"points": points}},
    }
    assert write_curve(found, tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_fastest_point_of_a_side_has_the_recall_and_small_codes() -> None:
    rows = [
        {"side": side, "recall": share, "qps": rate, "bytes_per_vector": size}
        for side, share, rate, size in [
            ("flat", 1.0, 90.0, 512.0),
            ("hnswlib", 0.94, 3000.0, 700.0),
            ("hnswlib", 0.96, 900.0, 700.0),
            ("rabitq random", 0.97, 2000.0, 33.0),
            ("pq4 opq", 0.96, 1500.0, 32.0),
            ("pq4 opq", 0.99, 100.0, 32.0),
        ]
    ]
    assert fastest(rows, 0.95, 32.0) == {"hnswlib": 2, "ours": 4}
    assert fastest(rows, 0.95, 33.0) == {"hnswlib": 2, "ours": 3}
    assert fastest(rows, 0.98, 32.0) == {"ours": 5}
