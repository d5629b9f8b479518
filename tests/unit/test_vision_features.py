"""Vision features that were computed before give the very prefix that the vision tower would give now."""

import dataclasses

import pytest
import torch
from torch import Tensor

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.vision import VisionFeatures
from slq.errors import DataError
from slq.prefix import Prefix
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, picture

MIXED = [
    Item(text="a red dog"),
    Item(image=picture(3, 2)),
    Item(text="two blue cats on a white background", image=picture(2, 4, seed=1)),
    Item(text="B"),
    Item(image=picture(4, 1, seed=2)),
]
PICTURED = [item for item in MIXED if item.image is not None]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(family: str, *, double: bool = False, padding_side: str = "right") -> Backbone:
    return BUILDERS[family](double=double, settings=PromptSettings(padding_side=padding_side))


def tensors(prefix: Prefix) -> list[Tensor]:
    return [*prefix.keys, *prefix.values, prefix.mask, prefix.next_position, prefix.last_hidden]


def refuse_the_tower(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the vision tower ran")

    monkeypatch.setattr(backbone.core, "get_image_features", refuse)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_prefix_from_features_of_the_same_batch_is_bit_identical(
    family: str, padding_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build(family, padding_side=padding_side)
    prompts = backbone.prompts(MIXED)
    usual = backbone.prefix(prompts)
    features = backbone.vision_features(prompts)
    refuse_the_tower(backbone, monkeypatch)
    for ours, theirs in zip(
        tensors(backbone.prefix(prompts, features)), tensors(usual), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_features_of_single_images_serve_any_batch_and_any_text(
    family: str, padding_side: str
) -> None:
    backbone = build(family, double=True, padding_side=padding_side)
    kept = [backbone.vision_features(backbone.prompts([item]))[0] for item in PICTURED]
    others = [
        Item(image=PICTURED[2].image, text="a small dog"),
        Item(text="a red dog"),
        Item(image=PICTURED[0].image, text="B"),
    ]
    prompts = backbone.prompts(others, close=False)
    fast, slow = backbone.prefix(prompts, [kept[2], kept[0]]), backbone.prefix(prompts)
    assert torch.equal(fast.next_position, slow.next_position)
    real = prompts.mask[:, None, :, None]
    for ours, theirs in zip((*fast.keys, *fast.values), (*slow.keys, *slow.values), strict=True):
        torch.testing.assert_close(ours * real, theirs * real, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.last_hidden, slow.last_hidden, rtol=0, atol=1e-10)


def test_there_is_one_feature_per_placeholder_in_row_order(family: str) -> None:
    backbone = build(family)
    prompts = backbone.prompts(MIXED)
    features = backbone.vision_features(prompts)
    places = (prompts.input_ids == backbone.image_token_id).sum(1)
    assert [len(image) for image in features] == places[[1, 2, 4]].tolist()
    for image in features:
        assert tuple(image.tokens.shape) == (len(image), HIDDEN)
        assert image.tokens.dtype == backbone.dtype
        assert not image.tokens.requires_grad


def test_each_image_is_on_its_own_memory(family: str) -> None:
    backbone = build(family)
    for image in backbone.vision_features(backbone.prompts(MIXED)):
        held = [image.tokens, *image.deepstack]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
        assert image.num_bytes == len(held) * len(image) * HIDDEN * 4


def test_only_qwen3_vl_has_deepstack_levels_and_they_matter(family: str) -> None:
    backbone = build(family, double=True)
    prompts = backbone.prompts(PICTURED)
    features = backbone.vision_features(prompts)
    levels = 2 if family == "qwen3_vl" else 0
    assert [len(image.deepstack) for image in features] == [levels] * 3
    zeroed = [
        dataclasses.replace(
            image, deepstack=tuple(torch.zeros_like(level) for level in image.deepstack)
        )
        for image in features
    ]
    moved = (
        backbone.prefix(prompts, zeroed).last_hidden - backbone.prefix(prompts).last_hidden
    ).norm(dim=1)
    assert bool((moved > 1e-2).all()) == (family == "qwen3_vl")


def test_texts_have_no_features_and_need_none(family: str) -> None:
    backbone = build(family)
    prompts = backbone.prompts([MIXED[0], MIXED[3]])
    assert backbone.vision_features(prompts) == []
    assert torch.equal(
        backbone.prefix(prompts, []).last_hidden, backbone.prefix(prompts).last_hidden
    )


def test_features_of_another_number_or_size_are_refused(family: str) -> None:
    backbone = build(family)
    prompts = backbone.prompts(MIXED)
    features = backbone.vision_features(prompts)
    shorter = VisionFeatures(features[0].tokens[:-1], features[0].deepstack)
    for wrong in ([], features[:2], [*features, features[0]], [shorter, *features[1:]]):
        with pytest.raises(DataError, match="pass those of the same images"):
            backbone.prefix(prompts, wrong)
    with pytest.raises(DataError, match=r"take \[\] tokens"):
        backbone.prefix(backbone.prompts([MIXED[0]]), features[:1])


def test_moving_keeps_every_level() -> None:
    backbone = build("qwen3_vl")
    image = backbone.vision_features(backbone.prompts(PICTURED[:1]))[0]
    moved = image.to("meta")
    assert moved.tokens.device.type == "meta"
    assert [level.shape for level in moved.deepstack] == [level.shape for level in image.deepstack]
    assert image.to("cpu").tokens is image.tokens
