"""The benchmarks of the service against a real one: small runs, whose figures are there and add up."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import serving
from jobs.bench.serving.stand import Settings, prepared

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = ("data.scenes={train: 8, test: 24, unseen: 0}", "adapter.num_latents=4")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def measured(out: Path, *arguments: str) -> dict[str, Any]:
    overrides = [word for one in (*SMALL, "serve.num_threads=1") for word in ("--set", one)]
    return serving.run(["--out", str(out), "--seed", "3", *overrides, *arguments])


@pytest.mark.campaign
def test_overhead_measures_every_side_as_often_as_the_others(ray_cluster: None, out: Path) -> None:
    arguments = ("--part", "overhead", "--seconds", "1", "--repeats", "2")
    found = measured(out, *arguments)["overhead"]
    assert found["rounds"] == 2
    sides = found["sides_ms"]
    assert set(sides) == {
        *("noop", "composed", "text", "embedding"),
        *("direct_text", "direct_embedding", "paused_text", "paused_embedding"),
    }
    assert all(side["p50"] > 0 for side in sides.values())
    for kind, differences in found["overhead_ms_by_round"].items():
        assert found["overhead_ms"][kind] == pytest.approx(sum(differences) / 2, abs=0.002)
    assert set(found["parts_ms"]["text"]) >= {"embed", "search"}
    assert json.loads((out / "overhead.json").read_text())["overhead"] == found


def test_an_index_is_prepared_once(ray_cluster: None, out: Path) -> None:
    settings = Settings(overrides=SMALL, out=out)
    first = prepared(settings)
    pointer = first.storage.index.stat().st_mtime_ns
    adapter = (first.storage.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    again = prepared(settings)
    assert again.storage.index.stat().st_mtime_ns == pointer
    assert (again.storage.adapter / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert again.serve.port != 8000


@pytest.mark.campaign
def test_chaos_counts_requests_around_a_fault_and_waits_until_it_is_healed(
    ray_cluster: None, out: Path
) -> None:
    arguments = ("--part", "chaos", "--kinds", "partition", "--signals", "KILL")
    found = measured(out, *arguments, "--rates", "10", "--seconds", "1")["chaos"]
    assert found["replicas"]["BackboneService"] == 2
    assert {"Partition0", "Partition1"} <= set(found["replicas"])
    (fault,) = found["faults"]
    assert (fault["kind"], fault["signal"]) == ("partition", "KILL")
    assert fault["healed_s"] is not None
    assert found["before_faults"]["failed"] == found["before_faults"]["wrong"] == 0
    parts = [found["before_faults"], fault]
    assert sum(one["requests"] for one in parts) == found["all"]["requests"]
    assert Path(found["chart"]).is_file()
