"""Training on two Ray workers with DeepSpeed equals a plain loop in this process; the frozen stays frozen."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipelines.engine import make_engine
from pipelines.loading import backbone_of, untrained_latents
from pipelines.mine import mine
from pipelines.pairs import Pairs
from pipelines.recipe import Recipe
from pipelines.selection import ChosenPairs, hold_out
from pipelines.train import history, settings_digest, train
from slq.arrow import PAIRS
from slq.artifacts import load_adapter_config
from slq.errors import ConfigError, DataError, HardwareError, StorageError, TrainingError
from slq.files import read_json
from slq.losses import info_nce
from slq.media import decode_image
from slq.schema import Item
from slq.training import PairSampler, PrefixSource, learning_rate_scale
from tests.integration.runs import changed, enlarge, fingerprints_of_files, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


STEPS = 6
# what Ray Train sets for a worker group, for one process
ENGINE_ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(free_port()),
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def pairs_file(scenes_dir: Path, storage: Path) -> Path:
    """The training pairs of the scenes, and behind them two that cannot be used."""
    rows = pq.read_table(scenes_dir / "train.parquet").to_pylist()
    bad = [
        {**rows[3], "id": "no image", "image": b"no image"},
        {**rows[7], "id": "no text", "text": "  "},
    ]
    path = storage / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([*rows, *bad], schema=PAIRS), path)
    return path


@pytest.fixture
def recipe(tiny_run: Recipe, storage: Path, pairs_file: Path) -> Recipe:
    """All tests here look at one finished run; the first of them pays for it."""
    return changed(
        tiny_run,
        data={"train": pairs_file},
        train={"num_steps": STEPS, "checkpoint_every": 2, "max_error_share": 0.05},
        storage={"dir": storage / "run"},
    )


@pytest.fixture
def adapter(recipe: Recipe) -> Path:
    return train(recipe)


def plain_run(recipe: Recipe) -> tuple[list[float], torch.Tensor]:
    """Losses and latents of the same training without Ray, DeepSpeed, prefixes or caches kept between steps."""
    config = recipe.train
    torch.set_num_threads(1)
    backbone = backbone_of(recipe)
    latents = untrained_latents(recipe, backbone)
    rows = pq.read_table(recipe.data.path("train")).to_pylist()[:64]  # the usable ones
    keys = [hashlib.sha256(row["image"]).hexdigest() for row in rows]
    optimiser = torch.optim.AdamW(
        latents.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    losses = []
    sampler = PairSampler(keys, config.global_batch, config.seed, order="block")
    for step, batch in sampler.batches(0, config.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * learning_rate_scale(step, config)
        images = [Item(image=decode_image(rows[n]["image"])) for n in batch]
        texts = [Item(text=rows[n]["text"]) for n in batch]
        loss = info_nce(
            latents.embed_items(backbone, images),
            latents.embed_items(backbone, texts),
            latents.temperature,
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(latents.parameters(), config.clip_norm)
        optimiser.step()
        losses.append(loss.item())
    return losses, latents.latents.detach()


def test_two_workers_learn_what_one_plain_process_learns(recipe: Recipe, adapter: Path) -> None:
    losses, latents = plain_run(recipe)
    steps = history(recipe)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)
    ours = load_file(adapter / "adapter_model.safetensors")["latents"]
    moved = untrained_latents(recipe, backbone_of(recipe)).latents.detach()
    assert (latents - moved).abs().max() > 1e-3  # there was something to learn
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)


def test_the_adapter_holds_the_latents_and_the_temperature_and_nothing_else(
    recipe: Recipe, adapter: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    width = backbone_of(recipe).hidden_size
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "latents": (recipe.adapter.num_latents, width),
        "log_temperature": (1,),
    }
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_the_engine_leaves_weights_and_logits_bit_identical(recipe: Recipe) -> None:
    """`train` itself refuses to finish when the digest has changed; this shows it for DeepSpeed's engine."""
    import ray

    @ray.remote(num_cpus=1)
    def probe(settings: Recipe) -> tuple[str, str, bool]:
        backbone = backbone_of(settings)
        first = backbone.weights_sha256()
        latents = untrained_latents(settings, backbone)
        engine = make_engine(settings, backbone, latents, 1)
        pairs = ChosenPairs(Pairs(settings.data.path("train")), np.arange(8))
        source = PrefixSource(backbone, pairs, cache_bytes=0)
        prompt = backbone.prompts([Item(text="a fox")])
        before = backbone.model(input_ids=prompt.input_ids).logits
        for _ in range(3):
            rows = list(range(8))
            loss = engine(source.queries(rows), source.positives(rows))
            engine.backward(loss)
            engine.step()
        after = backbone.model(input_ids=prompt.input_ids).logits
        return first, backbone.weights_sha256(), bool(torch.equal(before, after))

    first, last, same_logits = ray.get(
        probe.options(runtime_env={"env_vars": ENGINE_ENVIRONMENT}).remote(recipe)
    )
    assert first == last == backbone_of(recipe).weights_sha256()
    assert same_logits


def test_a_changed_backbone_would_be_noticed(recipe: Recipe) -> None:
    backbone = backbone_of(recipe)
    before = backbone.weights_sha256()
    parameter = next(backbone.model.parameters())
    parameter.data.view(-1)[0] += 1e-6
    assert backbone.weights_sha256() != before


def test_bad_pairs_are_left_out_by_name_and_too_many_are_refused(
    recipe: Recipe, adapter: Path, pairs_file: Path
) -> None:
    """The shared run has them too, and learned what a plain process learns without them."""
    done = read_json(recipe.storage.dir / "train" / "done.json")
    assert done["refused"]["no text"] == "the caption is empty"
    assert set(done["refused"]) == {"no image", "no text"}
    assert Pairs(pairs_file).check(0.05)[0] == list(range(64))
    with pytest.raises(DataError, match="2 of 66 training pairs cannot be used, first 'no image'"):
        Pairs(pairs_file).check(0.01)


def test_more_workers_than_the_cluster_holds_are_refused_at_once(
    recipe: Recipe, tmp_path: Path
) -> None:
    large = changed(
        recipe,
        train={"global_batch": 512},
        resources={"train_workers": 512},
        storage={"dir": tmp_path / "x"},
    )
    with pytest.raises(HardwareError, match="needs 512 CPUs, but the cluster has"):
        train(large)


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_lost_a_file_is_given_back(
    recipe: Recipe, adapter: Path, lost: str
) -> None:
    before = (adapter / lost).read_bytes()
    (adapter / lost).unlink()
    train(recipe)
    assert (adapter / lost).read_bytes() == before


def test_a_second_run_does_nothing(recipe: Recipe, adapter: Path) -> None:
    before = fingerprints_of_files(recipe.storage.dir)
    assert train(recipe) == adapter
    assert fingerprints_of_files(recipe.storage.dir) == before


def test_a_finished_run_whose_adapter_was_lost_gives_it_back(recipe: Recipe, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    adapter.rename(adapter.with_name("lost"))
    train(recipe)
    assert weights.read_bytes() == before
    assert [step["step"] for step in history(recipe)] == list(range(1, STEPS + 1))


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_a_worker_when(
    ready: Callable[[], bool], rng: random.Random, killed: list[int]
) -> threading.Thread:
    """SIGKILL one of the training workers at the first moment that `ready` says so, and note which."""
    import psutil

    def workers() -> list[int]:
        found = []
        for process in psutil.Process().children(recursive=True):  # of this session's own Ray
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process.pid)
        return sorted(found)

    def watch() -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if ready() and (victims := workers()):  # none are there while Ray starts new ones
                victim = rng.choice(victims)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train looks at its workers every 0.1 s instead of 2: what it has not seen, a run cannot go on from."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")


SEEN = "checkpoint_manager_snapshot.json"  # where Ray Train notes the checkpoints that it has seen


@pytest.mark.parametrize(("seed", "twice"), [(11, False), (13, True)])
def test_a_run_whose_workers_are_killed_has_the_losses_of_a_whole_one(
    recipe: Recipe, adapter: Path, tmp_path: Path, seed: int, twice: bool
) -> None:
    """A worker dies after a random step, and, where `twice`, one more while a checkpoint is written."""
    rng = random.Random(seed)
    local = changed(recipe, train={"max_failures": 4}, storage={"dir": tmp_path / "run"})
    step, checkpoint = rng.randint(1, STEPS - 1), rng.choice([2, 4])
    print(f"seed {seed}: kill after step {step}, then in checkpoint {checkpoint}: {twice}")
    steps = local.storage.dir / "train" / "history.jsonl"
    folders = local.storage.dir / "ray"
    killed: list[int] = []
    killers = [kill_a_worker_when(lambda: lines_in(steps) >= step, rng, killed)]
    if twice:

        def is_written() -> bool:
            return len(killed) == 1 and any(folders.glob(f"*/step_{checkpoint:07d}"))

        killers.append(kill_a_worker_when(is_written, rng, killed))
    train(local)
    for killer in killers:
        killer.join()
    assert len(killed) == len(killers)
    assert [s["loss"] for s in history(local)] == [s["loss"] for s in history(recipe)]
    ours, whole = (r.storage.adapter / "adapter_model.safetensors" for r in (local, recipe))
    assert ours.read_bytes() == whole.read_bytes()


def test_a_full_disk_ends_in_words_and_the_same_command_finishes(
    recipe: Recipe, adapter: Path, small_disk: Path
) -> None:
    local = changed(recipe, train={"max_failures": 0}, storage={"dir": small_disk / "run"})
    with pytest.raises(StorageError, match=r"No space left on device.*free space") as caught:
        train(local)
    assert len(str(caught.value).splitlines()) == 1
    assert not local.storage.adapter.exists()
    enlarge(small_disk)
    train(local)
    assert [s["loss"] for s in history(local)] == [s["loss"] for s in history(recipe)]
    ours, whole = (r.storage.adapter / "adapter_model.safetensors" for r in (local, recipe))
    assert ours.read_bytes() == whole.read_bytes()


def test_a_run_learns_from_what_the_one_before_mined(
    recipe: Recipe, adapter: Path, tmp_path: Path
) -> None:
    """Mine with margins, train with them and a variant, lose the variant, get it back."""
    shutil.copytree(recipe.storage.dir / "adapter", tmp_path / "run" / "adapter")
    data = {"negatives": tmp_path / "negatives.parquet"}
    mining = changed(recipe, data=data, storage={"dir": tmp_path / "run"}, mine={"margins": True})
    wanted = changed(
        recipe,
        data=data,
        adapter={"variants": {"one": {"num_latents": 1}}},
        train={"negatives": 2, "distillation": 0.5, "zero_stage": 0, "num_steps": 2},
        storage={"dir": tmp_path / "mined"},
    )
    with pytest.raises(ConfigError, match=r"negatives\.parquet does not exist; run `slq mine`"):
        train(wanted)
    assert mine(mining)["pairs"] == 64
    train(wanted)
    first, plain = history(wanted)[0]["loss"], history(recipe)[0]["loss"]
    assert first > plain + 0.05
    one = wanted.storage.variant("one")
    assert load_adapter_config(one).num_latents == 1
    before = (one / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(one)
    train(wanted)
    assert (one / "adapter_model.safetensors").read_bytes() == before
    digest = settings_digest(wanted)
    rows = pq.read_table(data["negatives"])
    pq.write_table(rows.slice(1), data["negatives"])
    assert settings_digest(wanted) != digest
    unscored = rows.set_column(3, "margins", pa.nulls(len(rows), rows.schema.field(3).type))
    pq.write_table(unscored, data["negatives"])
    with pytest.raises(ConfigError, match=r"set mine\.margins=true"):
        train(wanted)


def test_one_worker_goes_on_where_two_gave_up(
    recipe: Recipe, adapter: Path, tmp_path: Path, seen_at_once: None
) -> None:
    """One of two workers dies while a checkpoint is written, and nobody may start it again."""
    rng = random.Random(12)
    print("seed 12: kill in checkpoint 4")
    local = changed(recipe, train={"max_failures": 0}, storage={"dir": tmp_path / "run"})
    folders = local.storage.dir / "ray"
    killed: list[int] = []

    def is_written() -> bool:
        seen = any("step_0000002" in path.read_text() for path in folders.glob(f"*/{SEEN}"))
        return seen and any(folders.glob("*/step_0000004"))

    killer = kill_a_worker_when(is_written, rng, killed)
    with pytest.raises(TrainingError, match="training failed"):
        train(local)
    killer.join()
    assert len(killed) == 1
    alone = changed(local, resources={"train_workers": 1}, train={"zero_stage": 0})
    train(alone)
    found = [s["loss"] for s in history(alone)]
    whole = [s["loss"] for s in history(recipe)]
    assert found[:2] == whole[:2]
    assert found == pytest.approx(whole, rel=1e-5)


def test_images_held_out_are_not_trained_on() -> None:
    keys = [f"image{n % 12}" for n in range(30)]
    kept, held = hold_out(keys, [n for n in range(30) if n != 3], 4, seed=0)
    assert len(held) == len({keys[n] for n in held}) == 4
    assert {keys[n] for n in held}.isdisjoint(keys[n] for n in kept)
    assert 3 not in {*kept.tolist(), *held.tolist()}
    again, _ = hold_out(keys, [n for n in range(30) if n != 3], 4, seed=0)
    assert kept.tolist() == again.tolist()
    everything, nothing = hold_out(keys, range(30), 0, seed=0)
    assert everything.tolist() == list(range(30))
    assert nothing.tolist() == []
    with pytest.raises(ConfigError, match="held_out is 12, but the data has only 12 images"):
        hold_out(keys, range(30), 12, seed=0)


def test_a_batch_that_cannot_be_shared_out_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    uneven = changed(
        recipe, train={"zero_stage": 3, "global_batch": 15}, storage={"dir": tmp_path / "x"}
    )
    with pytest.raises(ConfigError, match=r"train_workers \(2\) must divide .*global_batch \(15\)"):
        train(uneven)
    crowded = changed(recipe, resources={"train_workers": 17}, storage={"dir": tmp_path / "x"})
    with pytest.raises(ConfigError, match="less than one pair for each of 17 workers"):
        train(crowded)
    for cache in ("disk_cache", "vision_cache"):
        kept = {"adapter": {"method": "lora"}, "train": {cache: tmp_path / "kept"}}
        with pytest.raises(ConfigError, match=f"train.{cache} keeps .* adapter.method lora"):
            train(changed(recipe, **kept, storage={"dir": tmp_path / "x"}))
    with pytest.raises(ConfigError, match="give a folder or s3://bucket/prefix"):
        train(changed(recipe, storage={"dir": tmp_path / "x", "checkpoints": "ftp://x/y"}))


def test_an_object_store_that_refuses_is_named_in_one_line(
    recipe: Recipe, tmp_path: Path, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key nothing can be written, and no worker starts."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    place = f"s3://{object_store}/demo"
    local = changed(recipe, storage={"dir": tmp_path / "run", "checkpoints": place})
    with pytest.raises(StorageError, match=f"{place} cannot be written: .*credentials") as caught:
        train(local)
    assert len(str(caught.value).splitlines()) == 1


def test_a_run_goes_on_from_an_object_store_after_its_process_died(
    recipe: Recipe,
    adapter: Path,
    tmp_path: Path,
    object_store: str,
    ray_cluster: None,
    seen_at_once: None,
) -> None:
    """The command itself, in processes of its own: the first is killed with all its workers."""
    import s3fs

    path = tmp_path / "recipe.yaml"
    local = changed(
        recipe, storage={"dir": tmp_path / "run", "checkpoints": f"s3://{object_store}/demo"}
    )
    path.write_text(yaml.safe_dump(local.model_dump(mode="json")))
    command = [sys.executable, "-c", "from jobs.cli import app; app()", "train", str(path)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (tmp_path / "first.log").open("wb") as output:
        first = subprocess.Popen(
            command, stderr=output, stdout=output, env=environment, start_new_session=True
        )
        deadline, stored = time.monotonic() + 300, []
        while not stored and first.poll() is None and time.monotonic() < deadline:
            s3fs.S3FileSystem.clear_instance_cache()
            store = s3fs.S3FileSystem()
            seen = store.glob(f"{object_store}/demo/*/{SEEN}")
            stored = [path for path in seen if "step_0000002" in store.cat_file(path).decode()]
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert stored
    assert not (local.storage.dir / "train" / "done.json").exists(), (
        tmp_path / "first.log"
    ).read_text()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "train goes on after step" in second.stderr
    assert [s["loss"] for s in history(local)] == [s["loss"] for s in history(recipe)]
    assert not (local.storage.dir / "ray").exists()
    shutil.rmtree(local.storage.adapter)
    train(local)  # gives it back without any worker
    ours, whole = (r.storage.adapter / "adapter_model.safetensors" for r in (local, recipe))
    assert ours.read_bytes() == whole.read_bytes()


def test_a_run_is_not_taken_for_finished_after_its_data_changed(
    recipe: Recipe,
    adapter: Path,
    scenes_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    pairs = pq.read_table(scenes_dir / "train.parquet")
    local = changed(recipe, data={"train": tmp_path / "pairs.parquet"})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    before = settings_digest(local)
    assert settings_digest(changed(local, resources={"train_workers": 1})) == before
    assert settings_digest(changed(local, train={"cache_bytes": 0, "zero_stage": 3})) == before
    assert settings_digest(changed(local, train={"order": "uniform"})) != before
    monkeypatch.setattr("pipelines.train.backbone_revision", lambda *_: "another")
    assert settings_digest(local) != before
    monkeypatch.undo()
    assert settings_digest(local) == before
    pq.write_table(pairs.slice(1), tmp_path / "pairs.parquet")
    assert settings_digest(local) != before


def test_training_data_that_cannot_be_used_is_refused_by_name(
    recipe: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: .*absent\.parquet does not exist"):
        train(changed(recipe, data={"train": tmp_path / "absent.parquet"}))
    pairs = pq.read_table(scenes_dir / "train.parquet").to_pylist()
    pairs[3]["text"] = None
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(pairs, schema=PAIRS), path)
    with pytest.raises(DataError, match=r"pairs\.parquet: 1 pairs have no text; remove them"):
        Pairs(path)
    pq.write_table(pq.read_table(scenes_dir / "train.parquet", columns=["id", "text"]), path)
    with pytest.raises(DataError, match="cannot be read as pairs with id, image and text"):
        Pairs(path)


def test_too_little_data_for_a_batch_ends_with_the_reason(recipe: Recipe, tmp_path: Path) -> None:
    small = changed(
        recipe, train={"global_batch": 65, "max_failures": 0}, storage={"dir": tmp_path / "x"}
    )
    with pytest.raises(Exception, match="global_batch is 65, but the data has only") as caught:
        train(small)
    from slq.errors import SlqError

    assert isinstance(caught.value, SlqError)
    assert len(str(caught.value).splitlines()) == 1
