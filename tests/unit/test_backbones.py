"""Every family: batches equal single naive passes, folders load as they were saved, and image limits are pinned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slq.artifacts import fingerprint, save_adapter
from slq.backbones import FAMILIES, load_backbone
from slq.backbones.base import PromptSettings
from slq.backbones.random_weights import Draw, random_backbone
from slq.encoder import Encoder
from slq.errors import ArtifactMismatchError, ConfigError, DataError
from slq.latent_queries import LatentQueries
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, SIZES, picture, save
from tests.naive import chat_inputs, family_of, naive_embedding

QWEN = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
TILED = ["idefics3", "intern_vl", "llava_onevision", "smolvlm"]
MIXED = [
    Item(text="two blue cats on a white background"),
    Item(image=picture(3, 2)),
    Item(text="a small dog", image=picture(2, 4, seed=1)),
    Item(image=picture(4, 1, seed=2)),
    Item(text="B"),
    Item(image=picture(6, 6, seed=3)),
]
TILE_TOKENS = {"idefics3": 4, "intern_vl": 4, "smolvlm": 4, "llava_onevision": 4 * 4 + 1}


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def latent_queries() -> LatentQueries:
    return LatentQueries(4, HIDDEN, embedding_std=0.2, seed=1)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(BUILDERS[family](), tmp_path_factory.mktemp(family))


def test_there_is_a_tiny_model_of_every_supported_family() -> None:
    assert {family_of(build()) for build in BUILDERS.values()} == set(FAMILIES)
    assert sorted(QWEN + TILED) == sorted(BUILDERS)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_mixed_batch_equals_the_naive_forward_of_each_item(
    family: str, padding_side: str
) -> None:
    backbone = BUILDERS[family](double=True, settings=PromptSettings(padding_side=padding_side))
    latents = latent_queries().double()
    encoder = Encoder(backbone, latents)
    with torch.no_grad():
        slow = torch.stack([naive_embedding(backbone, item, latents.latents) for item in MIXED])
    together = encoder.encode_items(MIXED)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, slow, rtol=0, atol=1e-10)
    for batch_size in (1, 4, 32):
        vectors = encoder.encode(MIXED, batch_size=batch_size)
        np.testing.assert_allclose(
            vectors, slow.numpy(), rtol=0, atol=1e-7
        )  # handed out as float32


def test_llava_onevision_sees_the_projected_tower_of_the_tile_and_a_newline() -> None:
    backbone = BUILDERS["llava_onevision"](double=True)
    core: Any = backbone.core
    prompts = backbone.prompts(MIXED)
    pixels = prompts.vision["pixel_values"][:, 0].double()  # (images, 3, 32, 32)
    with torch.no_grad():
        tower = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        expected = core.multi_modal_projector(tower)  # (images, 16, hidden)
    features = backbone.vision_features(prompts)
    assert len(features) == len(expected) == 4
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours.tokens[:-1], theirs, rtol=0, atol=1e-12)
        assert torch.equal(ours.tokens[-1], core.image_newline)


@pytest.mark.parametrize("as_processor", [True, False], ids=["processor", "parts"])
def test_a_saved_folder_loads_as_the_same_backbone(
    family: str, as_processor: bool, tmp_path: Path
) -> None:
    backbone = BUILDERS[family]()
    loaded = load_backbone(str(save(backbone, tmp_path, as_processor=as_processor)))
    assert type(loaded) is type(backbone)
    ours, theirs = loaded.identity(), backbone.identity()
    for changed in ("model", "revision", "config_sha256"):  # saving adds names to the configuration
        ours.pop(changed), theirs.pop(changed)
    assert ours == theirs
    expected = Encoder(backbone, latent_queries()).encode(MIXED)
    found = Encoder(loaded, latent_queries()).encode(MIXED)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["smolvlm", "llava_onevision"])
def test_a_folder_laid_out_as_published_loads(name: str, tmp_path: Path) -> None:
    """The template beside the processor only, and values of another size and of videos in its configuration."""
    backbone = BUILDERS[name]()
    save(backbone, tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    path = tmp_path / "processor_config.json"
    published = {
        "processor_class": "SmolVLMProcessor",
        "video_processor": {"video_processor_type": "SmolVLMVideoProcessor"},
        "image_seq_len": 81,
        "num_image_tokens": 729,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | published))
    loaded = load_backbone(str(tmp_path))
    assert loaded.image_limits() == backbone.image_limits()
    np.testing.assert_array_equal(
        Encoder(loaded, latent_queries()).encode(MIXED),
        Encoder(backbone, latent_queries()).encode(MIXED),
    )


def test_an_adapter_reloads_with_the_backbone_and_limits_it_was_trained_with(
    family: str, folder: Path, tmp_path: Path
) -> None:
    max_pixels = 16 * 32 if family in QWEN else None
    backbone = load_backbone(str(folder), max_pixels=max_pixels)
    trained = Encoder(backbone, latent_queries())
    adapter = save_adapter(tmp_path / "adapter", backbone, latent_queries())
    loaded = Encoder.from_pretrained(adapter)
    assert loaded.backbone.image_limits() == backbone.image_limits()
    assert loaded.fingerprint == trained.fingerprint
    np.testing.assert_array_equal(loaded.encode(MIXED), trained.encode(MIXED))


@pytest.mark.parametrize("name", QWEN)
def test_an_adapter_is_refused_when_the_folder_got_other_limits(name: str, tmp_path: Path) -> None:
    model = save(BUILDERS[name](), tmp_path / "model", as_processor=False)
    adapter = save_adapter(tmp_path / "adapter", load_backbone(str(model)), latent_queries())
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["size"]["longest_edge"] = 64 * 64
    path.write_text(json.dumps(settings))
    with pytest.raises(ArtifactMismatchError, match=r"'max_pixels': 9216.*'max_pixels': 4096"):
        Encoder.from_pretrained(adapter)


@pytest.mark.parametrize("name", QWEN)
def test_max_pixels_bounds_the_tokens_and_is_part_of_the_fingerprint(
    name: str, tmp_path: Path
) -> None:
    model = str(save(BUILDERS[name](), tmp_path))
    free, bound = load_backbone(model), load_backbone(model, max_pixels=4 * 16 * 16)
    image = Item(image=picture(4, 4))
    tokens = [
        int((backbone.prompts([image]).input_ids == backbone.image_token_id).sum())
        for backbone in (free, bound)
    ]
    assert tokens == [16, 4]
    assert bound.image_limits() == {"min_pixels": 256, "max_pixels": 1024}
    assert fingerprint(free, None) != fingerprint(bound, None)
    with pytest.raises(ConfigError, match="scales every image to at least 256 pixels"):
        load_backbone(model, max_pixels=255)


@pytest.mark.parametrize("name", TILED)
def test_max_pixels_is_refused_where_the_tile_is_fixed(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one tile of 32 x 32 pixels; leave max_pixels out"):
        load_backbone(str(save(BUILDERS[name](), tmp_path)), max_pixels=1024)


@pytest.mark.parametrize("name", TILED)
def test_every_image_becomes_one_tile_of_the_models_size(name: str) -> None:
    backbone = BUILDERS[name]()
    prompts = backbone.prompts([item for item in MIXED if item.image is not None])
    assert prompts.vision["pixel_values"].shape[-2:] == (32, 32)
    places = (prompts.input_ids == backbone.image_token_id).sum(1)
    assert places.tolist() == [TILE_TOKENS[name]] * 4
    assert backbone.image_limits() == {"tiles": 1, "tile": 32, "tokens": TILE_TOKENS[name]}
    assert backbone.identity()["image_limits"] == backbone.image_limits()


@pytest.mark.parametrize("name", TILED)
def test_a_model_with_another_tile_works_whatever_its_processor_says(
    name: str, tmp_path: Path
) -> None:
    transformers_name = "internvl" if name == "intern_vl" else name
    sizes = replace(SIZES[transformers_name], side=64)
    larger = random_backbone(transformers_name, sizes, Draw(std=0.2, norm_std=0.2))
    smaller = BUILDERS[name]()
    larger.model.save_pretrained(tmp_path)
    for part in (smaller.tokenizer, smaller.processor.image_processor):
        part.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    tokens = {"llava_onevision": 8 * 8 + 1}.get(name, 16)
    assert loaded.image_limits() == {"tiles": 1, "tile": 64, "tokens": tokens}
    np.testing.assert_array_equal(
        Encoder(loaded, latent_queries()).encode(MIXED),
        Encoder(larger, latent_queries()).encode(MIXED),
    )


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_the_space_before_a_text_belongs_to_its_first_token(name: str) -> None:
    backbone = BUILDERS[name]()
    item = Item(text="dog")
    tokens = backbone.tokenizer.convert_ids_to_tokens(backbone.prompts([item]).input_ids[0])
    assert "\u0120dog" in tokens  # a byte-level token with its space
    assert torch.equal(backbone.prompts([item]).input_ids, chat_inputs(backbone, item)["input_ids"])


@pytest.mark.parametrize("name", TILED)
def test_no_marker_of_an_image_can_be_written_by_the_user(name: str) -> None:
    backbone = BUILDERS[name]()
    markers = set(backbone.special_tokens)
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.image_token_id) in markers
    control = {int(backbone.tokenizer.convert_tokens_to_ids(marker)) for marker in markers}
    for marker in sorted(markers):
        assert not control & set(backbone.text_ids(f"a {marker} dog"))


def test_a_backbone_without_weights_builds_the_same_prompts(family: str, tmp_path: Path) -> None:
    backbone = BUILDERS[family]()
    bare = load_backbone(str(save(backbone, tmp_path)), weights=False)
    assert bare.model.device.type == "meta"
    for ours, theirs in zip(bare.tokenised(MIXED), backbone.tokenised(MIXED), strict=True):
        assert ours.ids == theirs.ids
        assert ours.vision.keys() == theirs.vision.keys()
        assert all(torch.equal(ours.vision[name], theirs.vision[name]) for name in ours.vision)


def test_sequences_of_single_items_join_to_the_prompts_of_the_batch(family: str) -> None:
    backbone = BUILDERS[family]()
    together = backbone.prompts(MIXED)
    joined = backbone.collate([backbone.tokenised([item])[0] for item in MIXED])
    assert torch.equal(joined.input_ids, together.input_ids)
    assert torch.equal(joined.mask, together.mask)
    assert joined.vision.keys() == together.vision.keys()
    assert all(torch.equal(joined.vision[name], together.vision[name]) for name in joined.vision)
    with pytest.raises(DataError, match="empty batch"):
        backbone.collate([])
