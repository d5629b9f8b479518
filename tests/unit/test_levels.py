"""Images as 8-bit levels: bit for bit what the model's own processor makes of them, or not used at all."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slq.backbones import load_backbone
from slq.backbones.base import Backbone
from slq.backbones.levels import LevelImages, normalised, table_of
from slq.encoder import Encoder
from slq.errors import DataError
from slq.latent_queries import LatentQueries
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN

FOLLOWED = ["qwen3_vl", "qwen2_5_vl", "qwen2_vl", "intern_vl"]
SIZES = [(96, 96), (64, 32), (37, 53), (300, 111), (16, 16), (1, 3), (640, 480), (33, 32)]


def picture(width: int, height: int, mode: str = "RGB", seed: int = 5) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), dtype=np.uint8))


def encoder(name: str) -> Encoder:
    return Encoder(BUILDERS[name](), LatentQueries(4, HIDDEN, embedding_std=0.2, seed=3))


def by_the_processor(backbone: Backbone, image: Image.Image) -> Any:
    """The oracle: transformers' processor, called as its documentation says."""
    return backbone.processor(
        text=[backbone._opening[True]],
        images=[backbone.prepared(image)],
        return_tensors="pt",
        **backbone.image_settings,
    )


@pytest.mark.parametrize("name", [*FOLLOWED, "tiny"])
@pytest.mark.parametrize("size", SIZES)
def test_levels_become_bit_for_bit_what_the_processor_gives(
    name: str, size: tuple[int, int]
) -> None:
    backbone = load_backbone() if name == "tiny" else BUILDERS[name]()
    (prompt,) = backbone.tokenised([Item(image=picture(*size))], close=False)
    wanted = by_the_processor(backbone, picture(*size))
    assert prompt.ids == wanted["input_ids"][0].tolist()
    assert prompt.vision["pixel_values"].dtype == torch.uint8
    found = backbone.collate([prompt]).vision
    assert found.keys() == set(backbone.vision_inputs)
    for part in found:
        assert found[part].dtype == wanted[part].dtype
        assert torch.equal(found[part], wanted[part])


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_pictures_of_other_modes_are_converted_as_the_processor_does(name: str, mode: str) -> None:
    backbone = BUILDERS[name]()
    image = picture(48, 48, mode)
    found = backbone.prompts([Item(image=image)]).vision["pixel_values"]
    assert torch.equal(found, by_the_processor(backbone, image)["pixel_values"])


@pytest.mark.parametrize("name", FOLLOWED)
def test_images_of_many_sizes_share_a_batch(name: str) -> None:
    backbone = BUILDERS[name]()
    images = [picture(*size) for size in SIZES]
    found = backbone.prompts([Item(image=image) for image in images]).vision["pixel_values"]
    wanted = [by_the_processor(backbone, image)["pixel_values"] for image in images]
    assert torch.equal(found, torch.cat(wanted))


@pytest.mark.parametrize("name", ["qwen3_vl", "intern_vl"])
def test_other_means_and_deviations_are_followed(name: str) -> None:
    backbone = BUILDERS[name]()
    image_processor = backbone.processor.image_processor
    image_processor.image_mean, image_processor.image_std = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]
    (prompt,) = backbone.tokenised([Item(image=picture(40, 50))])
    assert prompt.vision["pixel_values"].dtype == torch.uint8
    found = backbone.collate([prompt]).vision["pixel_values"]
    assert torch.equal(found, by_the_processor(backbone, picture(40, 50))["pixel_values"])


def test_a_processor_that_does_something_else_keeps_its_own_way() -> None:
    backbone = BUILDERS["qwen3_vl"]()
    backbone.processor.image_processor.do_resize = False
    image = picture(32, 64)
    (prompt,) = backbone.tokenised([Item(image=image)])
    assert prompt.vision["pixel_values"].dtype == torch.float32
    wanted = by_the_processor(backbone, image)["pixel_values"]
    assert torch.equal(backbone.collate([prompt]).vision["pixel_values"], wanted)


def test_levels_that_this_processor_cannot_turn_into_numbers_are_refused() -> None:
    (prompt,) = BUILDERS["qwen3_vl"]().tokenised([Item(image=picture(32, 64))])
    other = BUILDERS["qwen3_vl"]()
    other.processor.image_processor.do_resize = False
    with pytest.raises(DataError, match="another version of the model's image processor"):
        other.collate([prompt])


@pytest.mark.parametrize("name", FOLLOWED)
def test_embeddings_are_those_of_the_processors_own_pixels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(*size) for size in SIZES]
    found = encoder(name).encode(images)
    monkeypatch.setattr(LevelImages, "_table", None)
    wanted = encoder(name).encode(images)
    np.testing.assert_array_equal(found, wanted)


def test_a_table_needs_every_level_of_every_channel() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(1, 3)  # (1, 3 * 256)
    values = torch.randn(1, 768)
    table = table_of(levels, values)
    assert table is not None
    assert torch.equal(table, values.view(3, 256))
    assert torch.equal(normalised(levels, table), values)
    assert torch.equal(
        normalised(levels.view(1, 3, 16, 16), table.double()), values.view(1, 3, 16, 16).double()
    )
    levels[0, 300] = 0  # level 44 of the second channel is gone
    assert table_of(levels, values) is None
    assert table_of(levels, values[:, :300]) is None
