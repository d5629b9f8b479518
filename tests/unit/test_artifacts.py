"""Adapter folders: what is written, what is checked on reading, what a full disk leaves behind."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slq.artifacts import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    fingerprint,
    load_adapter,
    load_adapter_config,
    require_same_fingerprint,
    save_adapter,
)
from slq.backbones import load_backbone
from slq.backbones.base import Backbone, PromptSettings
from slq.encoder import Encoder
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, StorageError
from slq.files import file_sha256, read_json, write_json
from slq.latent_queries import LatentQueries
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, picture, qwen3_vl


def latent_queries(seed: int = 0) -> LatentQueries:
    return LatentQueries(4, HIDDEN, embedding_std=0.2, temperature=0.05, seed=seed)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return qwen3_vl()


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_an_adapter_comes_back_as_it_was_saved(family: str, tmp_path: Path) -> None:
    backbone, latents = BUILDERS[family](settings=PromptSettings("one word", 77)), latent_queries()
    folder = save_adapter(tmp_path / "adapter", backbone, latents)
    loaded = load_adapter(folder, backbone)
    assert torch.equal(loaded.latents, latents.latents)
    assert torch.equal(loaded.log_temperature, latents.log_temperature)
    config = load_adapter_config(folder)
    assert (config.prompt, config.max_text_tokens) == ("one word", 77)
    assert config.temperature == pytest.approx(0.05)
    assert config.fingerprint == fingerprint(backbone, latents) == fingerprint(backbone, loaded)


def test_an_adapter_is_safetensors_json_and_a_card_of_a_few_kilobytes(
    backbone: Backbone, tmp_path: Path
) -> None:
    folder = save_adapter(
        tmp_path / "deep" / "adapter", backbone, latent_queries(), card="hit@1 0.5"
    )
    assert set(contents(folder)) == {ADAPTER_WEIGHTS, ADAPTER_CONFIG, "README.md"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "latents": (4, HIDDEN),
        "log_temperature": (1,),
    }
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["slq_type"] == "SLQ"
    card = (folder / "README.md").read_text()
    assert f"base_model: {backbone.name}" in card
    assert f"{4 * HIDDEN:,} values" in card
    assert card.endswith("hit@1 0.5")
    assert sum(len(data) for data in contents(folder).values()) < 10_000


def test_saving_twice_writes_the_same_bytes(backbone: Backbone, tmp_path: Path) -> None:
    first = contents(save_adapter(tmp_path / "a", backbone, latent_queries()))
    second = contents(save_adapter(tmp_path / "b", backbone, latent_queries()))
    assert first == second


def test_saving_replaces_an_older_adapter(backbone: Backbone, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", backbone, latent_queries(0))
    folder = save_adapter(tmp_path / "a", backbone, latent_queries(1))
    assert torch.equal(load_adapter(folder, backbone).latents, latent_queries(1).latents)


def test_the_fingerprint_is_the_same_for_the_same_parts_built_again(backbone: Backbone) -> None:
    assert fingerprint(qwen3_vl(), latent_queries()) == fingerprint(backbone, latent_queries())


def test_the_fingerprint_is_the_same_in_another_process(backbone: Backbone) -> None:
    code = (
        "from slq.artifacts import fingerprint; from tests.families import HIDDEN, qwen3_vl;"
        "from slq.latent_queries import LatentQueries;"
        "latents = LatentQueries(4, HIDDEN, embedding_std=0.2, temperature=0.05, seed=0);"
        "print(fingerprint(qwen3_vl(), latents))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == fingerprint(backbone, latent_queries())


def changed_latents() -> tuple[Backbone, LatentQueries | None]:
    latents = latent_queries()
    latents.latents.data[0, 0] += 1e-6
    return qwen3_vl(), latents


def changed_temperature() -> tuple[Backbone, LatentQueries | None]:
    latents = latent_queries()
    latents.log_temperature.data += 1e-3
    return qwen3_vl(), latents


def changed_picture_size() -> tuple[Backbone, LatentQueries | None]:
    backbone = qwen3_vl()
    processor = backbone.processor.image_processor
    processor.size = {**dict(processor.size), "longest_edge": 48 * 48}
    return backbone, latent_queries()


CHANGES: dict[str, Any] = {
    "latents": changed_latents,
    "temperature": changed_temperature,
    "no latents": lambda: (qwen3_vl(), None),
    "prompt": lambda: (qwen3_vl(settings=PromptSettings(prompt="one word")), latent_queries()),
    "text limit": lambda: (qwen3_vl(settings=PromptSettings(max_text_tokens=64)), latent_queries()),
    "backbone revision": lambda: (qwen3_vl(seed=1), latent_queries()),
    "weight type": lambda: (qwen3_vl(double=True), latent_queries()),
    "family": lambda: (BUILDERS["qwen2_5_vl"](), latent_queries()),
    "picture size": changed_picture_size,
}


def test_any_change_of_the_embedding_space_changes_the_fingerprint(backbone: Backbone) -> None:
    found = {name: fingerprint(*change()) for name, change in CHANGES.items()}
    found["unchanged"] = fingerprint(backbone, latent_queries())
    assert len(set(found.values())) == len(found)


def test_the_last_latent_is_read_where_the_adapter_says_so(
    backbone: Backbone, tmp_path: Path
) -> None:
    last = LatentQueries(4, HIDDEN, embedding_std=0.2, pooling="last")
    folder = save_adapter(tmp_path / "adapter", backbone, last)
    loaded = load_adapter(folder, backbone)
    assert loaded.pooling == "last"
    assert fingerprint(backbone, loaded) == fingerprint(backbone, last)
    mean = LatentQueries(4, HIDDEN, embedding_std=0.2)
    assert fingerprint(backbone, mean) != fingerprint(backbone, last)
    prefix = backbone.prefix(backbone.prompts([Item(text="a fox"), Item(text="two bees")]))
    states = last.states(backbone, prefix)
    expected = states[:, 3] / states[:, 3].norm(dim=1, keepdim=True)
    torch.testing.assert_close(Encoder(backbone, loaded).encode_prefix(prefix), expected)


def test_separate_sets_come_back_and_are_another_space(backbone: Backbone, tmp_path: Path) -> None:
    separate = LatentQueries(4, HIDDEN, embedding_std=0.2, sets="separate")
    loaded = load_adapter(save_adapter(tmp_path / "adapter", backbone, separate), backbone)
    assert isinstance(loaded, LatentQueries)
    assert loaded.sets == "separate"
    assert loaded.text_latents is not None
    assert torch.equal(loaded.text_latents, separate.latents)  # both start at the same values
    shared = LatentQueries(4, HIDDEN, embedding_std=0.2)
    assert fingerprint(backbone, loaded) == fingerprint(backbone, separate)
    assert fingerprint(backbone, loaded) != fingerprint(backbone, shared)


def test_the_padding_side_does_not_change_the_fingerprint(backbone: Backbone) -> None:
    left = qwen3_vl(settings=PromptSettings(padding_side="left"))
    assert fingerprint(left, latent_queries()) == fingerprint(backbone, latent_queries())


def test_another_backbone_is_refused_and_both_fingerprints_are_named(
    backbone: Backbone, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    other = qwen3_vl(seed=1)
    with pytest.raises(ArtifactMismatchError) as caught:
        load_adapter(folder, other)
    text = str(caught.value)
    assert fingerprint(backbone, latent_queries()) in text
    assert fingerprint(other, latent_queries()) in text
    assert backbone.revision in text
    assert other.revision in text


def test_another_width_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    config = read_json(folder / ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**config, "hidden_size": 64})
    with pytest.raises(ArtifactMismatchError, match=f"width 64, backbone .* has {HIDDEN}"):
        load_adapter(folder, backbone)


def test_two_fingerprints_must_be_equal_and_both_are_named() -> None:
    options = {"expected_in": "index", "found_in": "encoder", "remedy": "rebuild with `slq index`"}
    require_same_fingerprint("3f2a", "3f2a", **options)
    with pytest.raises(
        ArtifactMismatchError, match="3f2a, but encoder has 91bc; rebuild with `slq index`"
    ):
        require_same_fingerprint("3f2a", "91bc", **options)


def test_a_folder_without_an_adapter_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"adapter_config\.json is missing; run `slq train` first"
    ):
        load_adapter_config(tmp_path)


def test_missing_tensors_are_named(backbone: Backbone, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"incomplete: adapter_model\.safetensors is missing"):
        load_adapter(folder, backbone)


def test_damaged_tensors_are_an_artifact_error(backbone: Backbone, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    weights = folder / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors"):
        load_adapter(folder, backbone)


def test_a_damaged_or_missing_json_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"bad\.json is damaged"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(ArtifactError, match=r"absent\.json is missing"):
        read_json(tmp_path / "absent.json")


def test_an_unknown_key_in_the_adapter_config_names_the_nearest(
    backbone: Backbone, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    config = read_json(folder / ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**config, "num_latent": 4})
    with pytest.raises(ConfigError, match="num_latent is unknown; did you mean num_latents"):
        load_adapter_config(folder)


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "failing", ["write_bytes", "write_text", "open", "replace", "rename", "mkdir"]
)
def test_a_full_disk_is_a_storage_error_and_leaves_the_old_adapter_intact(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries(0))
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, no_space)
        with pytest.raises(
            StorageError, match="No space left on device; free space or choose another"
        ):
            save_adapter(folder, backbone, latent_queries(1))
    assert folder.is_dir()
    assert contents(folder) == before
    save_adapter(folder, backbone, latent_queries(1))
    assert torch.equal(load_adapter(folder, backbone).latents, latent_queries(1).latents)


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"rows": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_space)
        with pytest.raises(StorageError, match=r"manifest\.json cannot be written"):
            write_json(path, {"rows": 2})
    assert read_json(path) == {"rows": 1}


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == known


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny Qwen3-VL, as `from_pretrained` reads it."""
    folder: Path = tmp_path_factory.mktemp("model")
    backbone = qwen3_vl()
    for part in (backbone.model, backbone.tokenizer, backbone.processor.image_processor):
        part.save_pretrained(folder)
    return folder


def test_a_backbone_loaded_twice_from_its_folder_has_one_fingerprint(model_folder: Path) -> None:
    first, second = load_backbone(str(model_folder)), load_backbone(str(model_folder))
    assert first.revision.startswith("sha256:")
    assert fingerprint(first, latent_queries()) == fingerprint(second, latent_queries())


@pytest.mark.parametrize("max_pixels", [None, 32 * 32])
def test_an_encoder_loaded_from_its_adapter_embeds_as_the_one_that_was_trained(
    model_folder: Path, tmp_path: Path, max_pixels: int | None
) -> None:
    settings = PromptSettings(prompt=" dog", max_text_tokens=5)
    backbone = load_backbone(str(model_folder), max_pixels=max_pixels, settings=settings)
    trained = Encoder(backbone, latent_queries())
    folder = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    loaded = Encoder.from_pretrained(folder)
    inputs = ["a small red dog stands left of two cats", picture(5, 4)]
    assert loaded.fingerprint == trained.fingerprint
    np.testing.assert_allclose(loaded.encode(inputs), trained.encode(inputs), rtol=0, atol=1e-6)


def test_an_adapter_whose_backbone_folder_changed_is_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", load_backbone(str(model_folder)), latent_queries())
    other = tmp_path / "other"
    changed = qwen3_vl(seed=1)
    for part in (changed.model, changed.tokenizer, changed.processor.image_processor):
        part.save_pretrained(other)
    config = read_json(folder / ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": str(other)})
    with pytest.raises(ArtifactMismatchError, match=config["fingerprint"]):
        Encoder.from_pretrained(folder)


def test_a_backbone_that_is_not_there_or_not_supported_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_backbone(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="family 'bert'; supported: qwen3_vl"):
        load_backbone(str(tmp_path))


def test_an_unknown_weight_type_is_a_config_error(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="float31"):
        load_backbone(str(model_folder), dtype="float31")
