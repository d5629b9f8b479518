"""Training on two Ray workers with DeepSpeed equals a plain loop in this process; the frozen stays frozen."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipelines.loading import backbone_of, untrained_latents
from pipelines.recipe import Recipe
from pipelines.train import Pairs, history, train
from slq.artifacts import read_json
from slq.errors import ConfigError, DataError, HardwareError
from slq.losses import info_nce
from slq.media import decode_image
from slq.schema import PAIRS, Item
from slq.training import PairSampler, PrefixSource, learning_rate_scale
from tests.integration.runs import changed, fingerprints_of_files, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


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


@pytest.fixture
def recipe(tiny_run: Recipe, storage: Path) -> Recipe:
    """All tests here look at one finished run; the first of them pays for it."""
    return changed(tiny_run, storage={"dir": storage / "run"})


@pytest.fixture
def adapter(recipe: Recipe) -> Path:
    return train(recipe)


def plain_run(recipe: Recipe) -> tuple[list[float], torch.Tensor]:
    """Losses and latents of the same training without Ray, DeepSpeed, prefixes or caches kept between steps."""
    config = recipe.train
    torch.set_num_threads(1)
    backbone = backbone_of(recipe)
    latents = untrained_latents(recipe, backbone)
    rows = pq.read_table(recipe.data.path("train")).to_pylist()
    keys = [hashlib.sha256(row["image"]).hexdigest() for row in rows]
    optimiser = torch.optim.AdamW(
        latents.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    losses = []
    for step, batch in PairSampler(keys, config.global_batch, config.seed).batches(
        0, config.num_steps
    ):
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
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
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

    from pipelines import train as flow

    @ray.remote(num_cpus=1)
    def probe(settings: Recipe) -> tuple[str, str, bool]:
        backbone = flow.backbone_of(settings)
        first = backbone.weights_sha256()
        latents = flow.untrained_latents(settings, backbone)
        engine = flow.make_engine(settings, backbone, latents, 1)
        pairs = Pairs(settings.data.path("train"))
        source = PrefixSource(backbone, pairs.read, cache_bytes=0)
        prompt = backbone.prompts([Item(text="a fox")])
        before = backbone.model(input_ids=prompt.input_ids).logits
        for _ in range(3):
            rows = list(range(8))
            loss = engine(source.images(rows, pairs.image_keys), source.texts(rows))
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
    recipe: Recipe, scenes_dir: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(scenes_dir / "train.parquet").to_pylist()
    rows[3]["image"], rows[7]["text"] = b"no image", "  "
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), path)
    usable, refused = Pairs(path).check(0.05)
    assert set(range(64)) - set(usable) == {3, 7}
    assert set(refused) == {rows[3]["id"], rows[7]["id"]}
    with pytest.raises(DataError, match="2 of 64 training pairs cannot be used, first 'train-"):
        Pairs(path).check(0.01)
    local = changed(
        recipe,
        data={"train": path},
        train={"num_steps": 1, "max_error_share": 0.05},
        storage={"dir": tmp_path / "run"},
    )
    train(local)
    done = read_json(tmp_path / "run" / "train" / "done.json")
    assert done["refused"][rows[7]["id"]] == "the caption is empty"
    assert len(history(local)) == 1


def test_more_workers_than_the_cluster_holds_are_refused_at_once(
    recipe: Recipe, tmp_path: Path
) -> None:
    large = changed(recipe, resources={"train_workers": 512}, storage={"dir": tmp_path / "x"})
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
    assert [step["step"] for step in history(recipe)] == [1, 2, 3, 4]


def test_replicated_and_partitioned_optimisers_give_the_same_losses(
    recipe: Recipe, adapter: Path, tmp_path: Path
) -> None:
    """The shared run uses ZeRO-2; this one ZeRO-0."""
    plain = changed(recipe, train={"zero_stage": 0}, storage={"dir": tmp_path / "zero0"})
    train(plain)
    assert [step["loss"] for step in history(plain)] == pytest.approx(
        [step["loss"] for step in history(recipe)], rel=1e-5
    )


def test_a_run_is_not_taken_for_finished_after_its_data_changed(
    recipe: Recipe,
    adapter: Path,
    scenes_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines.train import settings_digest

    pairs = pq.read_table(scenes_dir / "train.parquet")
    local = changed(recipe, data={"train": tmp_path / "pairs.parquet"})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    before = settings_digest(local)
    assert settings_digest(changed(local, resources={"train_workers": 1})) != before
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
