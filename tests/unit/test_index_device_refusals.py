"""GPUs that cannot be used as asked: refused before anything is read, with a way out; and what `slq doctor` says."""

from pathlib import Path
from typing import Any

import faiss
import pytest
from pydantic import ValidationError

from jobs.doctor import faiss_found
from slq.errors import ConfigError, HardwareError
from slq.index import Content, IndexConfig, VectorIndex, build, codes, devices, write_version
from slq.index.config import BITS, GPU_CODES, PLACES
from slq.index.devices import FaissBuild, device_of
from slq.index.versions import SEGMENTS
from tests.gpus import FakeGpus, real_gpus
from tests.unit.index_data import COUNT, DIMENSION, FLAT, IVF, unit_vectors
from tests.unit.test_index_devices import QUERIES, content, named, on, rows_of


@pytest.mark.skipif(real_gpus() > 0, reason="asks for hardware that must be absent")
@pytest.mark.parametrize("config", [FLAT, IVF], ids=named)
def test_an_absent_gpu_is_told_before_anything_is_read(tmp_path: Path, config: IndexConfig) -> None:
    class Unread:
        """A source that must not be read."""

        num_rows = COUNT

        def tables(self) -> Any:
            raise AssertionError

    unread = Content([Unread()], DIMENSION, "3f2a", {"embeddings": []})
    with pytest.raises(HardwareError, match=r"^index\.device is cuda, but "):
        write_version(tmp_path, unread, on(config))
    assert not list((tmp_path / SEGMENTS).iterdir())
    with pytest.raises(HardwareError, match=r"^index\.device is cuda:1, but "):
        build(on(config, "cuda:1"), unit_vectors(COUNT))
    write_version(tmp_path, content(), config)
    with pytest.raises(HardwareError, match=r"^index\.search_device is cuda, but "):
        VectorIndex(tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("found", "name", "problem"),
    [
        (
            FaissBuild("1.15.1", is_for_gpus=False, num_gpus=0),
            "cuda",
            "index.device is cuda, but the faiss 1.15.1 that is installed has no code for GPUs; replace it by "
            "`pip uninstall -y faiss-cpu && pip install 'slq[gpu]'`, or set index.device=cpu",
        ),
        (
            FaissBuild("1.15.1", is_for_gpus=True, num_gpus=0),
            "cuda:1",
            "index.device is cuda:1, but faiss sees no CUDA GPU here; set index.device=cpu, or run this where there "
            "is one",
        ),
        (
            FaissBuild("1.15.1", is_for_gpus=True, num_gpus=1),
            "cuda:1",
            "index.device is cuda:1, but faiss sees cuda:0 only here; set index.device=cpu, or run this where there "
            "is one",
        ),
        (
            FaissBuild("1.15.1", is_for_gpus=True, num_gpus=8),
            "cuda:8",
            "index.device is cuda:8, but faiss sees cuda:0 to cuda:7 here; set index.device=cpu, or run this where "
            "there is one",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, found: FaissBuild, name: str, problem: str
) -> None:
    monkeypatch.setattr(devices, "faiss_build", lambda: found)
    with pytest.raises(HardwareError) as caught:
        device_of(name)
    assert str(caught.value) == problem
    device_of("cpu").train(codes.untrained(IVF, DIMENSION), unit_vectors(COUNT))


def test_a_gpu_without_room_says_what_did_not_fit(tmp_path: Path, gpus: FakeGpus) -> None:
    write_version(tmp_path, content(), IVF)
    index, untrained = build(IVF, unit_vectors(COUNT)), codes.untrained(IVF, DIMENSION)
    gpus.full = True
    cuda, reason = device_of("cuda"), r"cudaMalloc error out of memory \[2\]"
    with pytest.raises(
        HardwareError, match=f"cuda:0 cannot learn lists and codes: {reason}; set index.device=cpu"
    ):
        cuda.train(untrained, unit_vectors(COUNT))
    assert not untrained.is_trained
    assert faiss.extract_index_ivf(untrained).clustering_index is None
    with pytest.raises(
        HardwareError, match=f"cuda:0 cannot find the lists of vectors: {reason}; set"
    ):
        cuda.nearest(index)
    with pytest.raises(
        HardwareError,
        match=f"cuda:0 cannot hold the index: {reason}; set index.search_device=cpu, or let fewer processes share",
    ):
        VectorIndex(tmp_path, device="cuda")
    gpus.full = False  # and nobody waits for the one who failed
    cuda.train(untrained, unit_vectors(COUNT))
    assert rows_of(VectorIndex(tmp_path, device="cuda").search(QUERIES, 3))


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1", ""])
@pytest.mark.parametrize("key", PLACES)
def test_a_device_has_one_of_three_forms(key: str, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"r\.yaml: {key}: Value error, must be cpu, cuda or cuda:N"
    ):
        IndexConfig.parse({key: name}, source="r.yaml")
    with pytest.raises(ConfigError, match=rf"^{key} is '{name}'; it must be cpu, cuda or cuda:N$"):
        device_of(name, key)


@pytest.mark.parametrize("kind", sorted({*BITS} - {*GPU_CODES}))
def test_codes_that_only_cpus_search_are_refused_on_a_gpu(tmp_path: Path, kind: str) -> None:
    asked = {"kind": "ivf", "codes": kind, "num_lists": 8}
    problem = (
        f"index.search_device is cuda, but faiss searches index.codes={kind} on CPUs only; set "
        "index.search_device=cpu, or choose one of float32, float16, int8, int4"
    )
    with pytest.raises(ConfigError) as caught:
        IndexConfig.parse({**asked, "search_device": "cuda"}, source="r.yaml")
    assert problem in str(caught.value)
    IndexConfig.parse({**asked, "device": "cuda"}, source="r.yaml")  # which may learn them
    write_version(tmp_path, content(), IndexConfig.model_validate(asked))
    with pytest.raises(ConfigError) as caught:
        VectorIndex(tmp_path, device="cuda")
    assert str(caught.value) == problem


def test_more_lists_than_a_gpu_visits_are_refused() -> None:
    asked = {"kind": "ivf", "num_lists": 4096, "num_probes": 2049, "search_device": "cuda:0"}
    with pytest.raises(
        ValidationError,
        match=r"search_device is cuda:0, where a query visits 2048 lists at most, and index\.num_probes is 2049; lower",
    ):
        IndexConfig.model_validate(asked)
    IndexConfig.model_validate({**asked, "num_probes": 2048})
    IndexConfig.model_validate({**asked, "search_device": "cpu"})
    IndexConfig.model_validate({**asked, "kind": "flat"})
    IndexConfig.model_validate({**asked, "goal": {}})  # which chooses them


@pytest.mark.parametrize(
    ("found", "both", "num_gpus", "text", "problem"),
    [
        (
            FaissBuild("1.15.1", is_for_gpus=False, num_gpus=0),
            False,
            0,
            "1.15.1 for CPUs: index.device must be cpu",
            "",
        ),
        (
            FaissBuild("1.15.1", is_for_gpus=True, num_gpus=2),
            False,
            2,
            "1.15.1 with code for GPUs, sees 2",
            "",
        ),
        (
            FaissBuild("1.15.1", is_for_gpus=True, num_gpus=0),
            False,
            2,
            "1.15.1 with code for GPUs, sees 0",
            "torch sees 2 GPUs and faiss 0: is the driver too old for the CUDA of faiss-gpu?",
        ),
        (
            FaissBuild("1.15.1", is_for_gpus=True, num_gpus=1),
            True,
            1,
            "sees 1",
            "both installed, and overwrite each",
        ),
        (
            ModuleNotFoundError("No module named 'faiss'"),
            False,
            0,
            "missing",
            "faiss is missing: pip install faiss-cpu",
        ),
        (
            RuntimeError("faiss-gpu installed but nvidia-cublas-cu12 is missing"),
            False,
            1,
            "cannot be loaded",
            "nvidia-cublas-cu12 is missing",
        ),
    ],
)
def test_the_doctor_knows_what_faiss_can_do(
    monkeypatch: pytest.MonkeyPatch,
    found: FaissBuild | Exception,
    both: bool,
    num_gpus: int,
    text: str,
    problem: str,
) -> None:
    def installed() -> FaissBuild:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(devices, "faiss_build", installed)
    monkeypatch.setattr(
        "jobs.doctor._version", lambda name: "1.15.1" if both or name == "faiss-gpu" else "missing"
    )
    told, problems = faiss_found(num_gpus)
    assert text in told
    assert len(problems) == bool(problem)
    assert problem in "".join(problems)
