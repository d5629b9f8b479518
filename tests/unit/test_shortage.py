"""A cluster that has become too small is told of once, and again when that happens again."""

import threading
from collections.abc import Iterator

import pytest

from pipelines.embedding.shortage import shortage_told
from pipelines.recipe import Recipe


def test_a_cluster_that_shrinks_is_told_of_once_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: Iterator[float] = iter([4, 1, 1, 1, 4, 1, 4])
    over = threading.Event()

    def resources() -> dict[str, float]:
        number = next(seen, None)
        if number is None:
            over.set()
        return {"CPU": number or 4.0}

    with shortage_told(Recipe(), resources, every_s=0.001):
        assert over.wait(30)
    assert [record.getMessage() for record in caplog.records] == 2 * [
        "the cluster has become too small: resources.embed_workers is 1, but the cluster has 1 CPUs and reading needs "
        "one; set it to at most 1; until then, or until nodes come back, the run waits"
    ]
