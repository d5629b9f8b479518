"""One local Ray for the whole session, scenes generated once, and a small recipe for every test."""

import os

# One thread per process: the machine that runs the tests may be small, and Ray adds processes of its own. torch reads
# it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.recipe import Recipe, ResourcesConfig, StorageConfig
from slq.benchmarks.scenes import ScenesConfig, write_scenes
from slq.training import TrainConfig

if TYPE_CHECKING:
    from tests.gpus import FakeGpus

SCENES = ScenesConfig(train=64, test=24, unseen=8, seed=7)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray, started as every command starts it, with a token of its own."""
    from pipelines.runtime import connect

    token = tmp_path_factory.mktemp("ray") / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect(ResourcesConfig()):
            yield


@pytest.fixture(autouse=True)
def priorities(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What this process asks its priority to be: it could never take it back, and later tests would wait for others."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "setpriority", lambda *priority: asked.append(priority))
    return asked


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes; tests read them and never write there."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, SCENES)
    return folder


@pytest.fixture
def tiny_run(scenes_dir: Path, tmp_path: Path) -> Recipe:
    """A run of seconds: 64 training pairs, a gallery of 32, four steps, everything below `tmp_path`."""
    recipe = Recipe()
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"dir": scenes_dir}),
            "adapter": recipe.adapter.model_copy(update={"num_latents": 4}),
            "train": TrainConfig(num_steps=4, global_batch=16, warmup_steps=1, checkpoint_every=4),
            "embed": recipe.embed.model_copy(update={"shard_rows": 8, "batch_size": 8}),
            "resources": ResourcesConfig(train_workers=2, embed_workers=2),
            "storage": StorageConfig(dir=tmp_path / "run"),
        }
    )


@pytest.fixture
def object_store() -> Iterator[str]:
    """A fresh bucket of an S3 server on this machine; the environment says where and with which key."""
    from tests.faulty_store import faulty_store

    with faulty_store(share=0) as store:
        yield store.bucket


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> "FakeGpus":
    """One GPU for faiss, which is not there; `count` makes more of it."""
    from tests.gpus import FakeGpus

    found = FakeGpus()
    found.install(monkeypatch)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
