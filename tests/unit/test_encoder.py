"""`Encoder`: order, batches, refusals, truncation, and the plain naive forward as the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from slq.backbones.base import Backbone, PromptSettings
from slq.encoder import Encoder, as_item
from slq.errors import DataError, MediaError
from slq.latent_queries import LatentQueries, embed_each
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, picture
from tests.naive import chat_inputs, family_of, naive_embedding, naive_hidden

INPUTS: list[Any] = [
    "two blue cats on a white background",
    picture(3, 2),
    {"text": "a red dog"},
    {"text": "a small dog", "image": picture(2, 4, seed=1)},
    Item(image=picture(4, 1, seed=2)),
    "B",
    picture(2, 2, seed=3),
]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def build(request: pytest.FixtureRequest) -> Callable[..., Backbone]:
    return BUILDERS[request.param]


def encoder_of(backbone: Backbone) -> Encoder:
    return Encoder(backbone, LatentQueries(4, HIDDEN, embedding_std=0.2, seed=1))


def assert_close(ours: NDArray[Any], theirs: NDArray[Any], atol: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_encode_keeps_the_input_order_and_equals_one_at_a_time(
    build: Callable[..., Backbone], batch_size: int
) -> None:
    encoder = encoder_of(build())
    together = encoder.encode(INPUTS, batch_size=batch_size)
    alone = np.concatenate([encoder.encode([value]) for value in INPUTS])
    assert (together.dtype, together.shape) == (np.float32, (len(INPUTS), encoder.dimension))
    assert_close(together, alone)
    assert_close(np.linalg.norm(together, axis=1), np.ones(len(INPUTS)))
    distances = np.linalg.norm(together[:, None] - together[None], axis=2) + 9 * np.eye(len(INPUTS))
    assert distances.min() > 1e-3


def test_encode_equals_the_plain_forward_over_the_processors_own_chat(
    build: Callable[..., Backbone],
) -> None:
    backbone = build()
    encoder = encoder_of(backbone)
    assert encoder.adapter is not None
    latents = encoder.adapter.latents.detach()
    with torch.no_grad():
        slow = torch.stack([naive_embedding(backbone, as_item(value), latents) for value in INPUTS])
    assert_close(encoder.encode(INPUTS), slow.numpy())


def test_without_latent_queries_the_last_token_is_read(build: Callable[..., Backbone]) -> None:
    backbone = build()
    nothing = torch.zeros(0, HIDDEN)
    with torch.no_grad():
        states = [naive_hidden(backbone, as_item(value), nothing)[-1] for value in INPUTS]
    slow = torch.stack([state / state.norm() for state in states]).numpy()
    assert_close(Encoder(backbone).encode(INPUTS), slow)


def test_prompts_hold_the_tokens_of_the_processors_own_chat(build: Callable[..., Backbone]) -> None:
    backbone = build()
    for value in INPUTS:
        item = as_item(value)
        ours, theirs = backbone.prompts([item]), chat_inputs(backbone, item)
        assert torch.equal(ours.input_ids, theirs["input_ids"])
        for name, tensor in ours.vision.items():
            assert torch.equal(tensor, theirs[name])


def test_nothing_encodes_to_no_rows(build: Callable[..., Backbone]) -> None:
    encoder = encoder_of(build())
    assert encoder.encode([]).shape == (0, encoder.dimension)


@pytest.mark.parametrize(
    "value", ["", "  \n", {"text": ""}, {"image": None}, {"text": None, "image": None}]
)
def test_empty_inputs_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="neither an image nor a text"):
        as_item(value)


def test_a_text_of_nothing_but_control_characters_is_refused(
    build: Callable[..., Backbone],
) -> None:
    with pytest.raises(MediaError, match="the text is empty"):
        encoder_of(build()).encode(["\x00"])


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        b"bytes",
        ["a"],
        {},
        {"txt": "a dog"},
        np.zeros((4, 4, 3)),
        {"text": 5},
        {"image": 5},
        {"image": np.zeros((4, 4, 3), np.uint8)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_kinds_are_refused_with_what_is_allowed(value: Any) -> None:
    with pytest.raises(DataError, match="pass a text, a PIL image, or a mapping"):
        as_item(value)


def test_a_path_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.png"):
        as_item({"image": tmp_path / "absent.png"})


def test_images_come_as_bytes_paths_or_pictures_alike(
    build: Callable[..., Backbone], tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture(3, 2).save(path)
    kinds = [picture(3, 2), {"image": picture(3, 2)}, {"image": path.read_bytes()}, {"image": path}]
    vectors = encoder_of(build()).encode([*kinds, {"image": str(path)}])
    assert_close(vectors, np.repeat(vectors[:1], len(vectors), axis=0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_in_a_mapping_equals_the_bare_picture_whatever_its_mode(mode: str) -> None:
    image = picture(2, 2).convert(mode)
    bare, wrapped = as_item(image).image, as_item({"image": image}).image
    assert bare is not None
    assert wrapped is not None
    assert wrapped.mode == bare.mode == "RGB"
    assert np.array_equal(np.asarray(wrapped), np.asarray(bare))


def test_a_transparent_picture_stands_on_white_as_decoded_files_do() -> None:
    image = as_item(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).image
    assert image is not None
    assert image.getpixel((1, 1)) == (255, 255, 255)


CHATML = "<|im_end|>\n<|im_start|>assistant\n"
CLOSING = {
    "llava_onevision": "<|im_end|><|im_start|>assistant\n",
    "smolvlm": "<end_of_utterance>\nAssistant:",
    "idefics3": "<end_of_utterance>\nAssistant:",
}
LONG = "a small red dog stands left of two blue cats on a white background " * 20


@pytest.mark.parametrize("limit", [1, 7, 30])
@pytest.mark.parametrize("with_image", [True, False])
def test_a_long_text_is_cut_but_the_closing_template_stays(
    build: Callable[..., Backbone], limit: int, with_image: bool
) -> None:
    backbone = build(settings=PromptSettings(max_text_tokens=limit))
    image = picture(2, 2) if with_image else None
    tokenizer = backbone.tokenizer
    closing = tokenizer.encode(CLOSING.get(family_of(backbone), CHATML), add_special_tokens=False)
    whole = chat_inputs(backbone, Item(text=LONG.strip(), image=image))["input_ids"][0].tolist()
    num_text = len(tokenizer.encode(LONG.strip(), add_special_tokens=False))
    opening = whole[: len(whole) - len(closing) - num_text]
    ours = backbone.prompts([Item(text=LONG, image=image)]).input_ids[0].tolist()
    assert ours == opening + whole[len(opening) : len(opening) + limit] + closing


def test_a_text_at_the_limit_is_not_cut(build: Callable[..., Backbone]) -> None:
    ids = build().token_ids("a red dog")
    backbone = build(settings=PromptSettings(max_text_tokens=len(ids)))
    assert backbone.text_ids("a red dog") == ids


@pytest.mark.parametrize("limit", range(1, 9))
def test_cutting_inside_a_character_keeps_the_limit(
    build: Callable[..., Backbone], limit: int
) -> None:
    backbone = build(settings=PromptSettings(max_text_tokens=limit))
    ids = backbone.text_ids("\U0001f415\u00e9\U0001f408")
    assert 1 <= len(ids) <= limit


def test_an_instruction_stands_between_the_content_and_the_closing(
    build: Callable[..., Backbone],
) -> None:
    plain = build().prompts([Item(text="a red dog")]).input_ids[0].tolist()
    backbone = build(settings=PromptSettings(prompt=" one word"))
    instruction = backbone.tokenizer.encode(" one word", add_special_tokens=False)
    closing = backbone.closing_ids
    ours = backbone.prompts([Item(text="a red dog")]).input_ids[0].tolist()
    assert ours == plain[: -len(closing)] + instruction + closing


def test_an_empty_batch_is_refused(build: Callable[..., Backbone]) -> None:
    with pytest.raises(DataError, match="empty batch"):
        build().prompts([])


def test_rows_of_many_adapters_share_a_pass_and_equal_each_adapters_own(
    build: Callable[..., Backbone],
) -> None:
    backbone = build()
    adapters = [
        LatentQueries(5, backbone.hidden_size, seed=1),
        LatentQueries(2, backbone.hidden_size, seed=2, pooling="last"),
        LatentQueries(3, backbone.hidden_size, seed=3, sets="separate"),
    ]
    with torch.no_grad():
        assert adapters[2].text_latents is not None
        adapters[2].text_latents.mul_(-1)  # or the two sets would be alike
    items = [Item(text="a cat"), Item(image=picture(3, 2)), Item(text="a longer text of dogs")] * 2
    numbers = [0, 1, 2, 2, 0, 1]
    prefix = backbone.prefix(backbone.prompts(items))
    mixed = embed_each(backbone, prefix, [adapters[n] for n in numbers]).numpy()
    for row, (number, item) in enumerate(zip(numbers, items, strict=True)):
        with torch.no_grad():
            alone = adapters[number].embed_items(backbone, [item]).numpy()
        assert_close(mixed[row : row + 1], alone)
    assert len({tuple(row.round(3)) for row in mixed}) == len(items)
