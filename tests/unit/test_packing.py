"""Packed rows equal one ordinary chat per turn, through the processor and the model as they are."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from slq.pretraining.mixture import ImageExample, Mixture, Turn
from slq.pretraining.model import GRID, image_processor, packed_hidden, patchify, tiny_config
from slq.pretraining.packing import SKILLS, Packer
from slq.pretraining.tokenizer import IMAGE, build_tokenizer
from slq.scenes import SceneSampler, explicit_captions, load_sprites


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(SceneSampler("train", 0, load_sprites()), num_matches=2, num_questions=1)


@pytest.fixture(scope="module")
def tokenizer(mixture: Mixture) -> PreTrainedTokenizerFast:
    return build_tokenizer(mixture, vocab_size=400, num_examples=40)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    config = tiny_config(tokenizer, hidden=64, num_layers=3, vision_hidden=32, vision_depth=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = Qwen3VLForConditionalGeneration(config)
        for parameter in built.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return built.double().eval()


def ordinary_logits(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    turn: Turn,
    pixels: NDArray[np.uint8] | None,
) -> tuple[Tensor, list[int]]:
    """(answer, vocab) logits of one un-packed chat at each token to predict, and those tokens.

    The chat template writes the text, the image processor the patches, the model its positions.
    """
    parts = [{"type": "image"}] if pixels is not None else []
    if turn.user:
        parts.append({"type": "text", "text": turn.user})
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": turn.answer}]
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    vision = {}
    if pixels is not None:
        vision = dict(image_processor()(images=[Image.fromarray(pixels)], return_tensors="pt"))
        num_visual = int(vision["image_grid_thw"].prod()) // 4
        opened, whole = (text.replace(IMAGE, IMAGE * num_visual) for text in (opened, whole))
    start = len(tokenizer.encode(opened, add_special_tokens=False))
    ids = torch.tensor([tokenizer.encode(whole, add_special_tokens=False)])
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        use_cache=False,
        **vision,
    )
    model.model.rope_deltas = None
    return output.logits[0, start - 1 : -1], ids[0, start:].tolist()


@torch.no_grad()
def test_packed_rows_predict_as_one_ordinary_chat_per_turn(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast, model: Qwen3VLForConditionalGeneration
) -> None:
    images = [mixture.image_example(index) for index in range(3)]
    texts = [[mixture.text_turn(3 * row + turn) for turn in range(3)] for row in range(2)]
    batch = Packer(tokenizer, GRID).pack(images, texts)
    logits = model.lm_head(packed_hidden(model, batch))
    rows: list[tuple[NDArray[np.uint8] | None, tuple[Turn, ...]]] = [
        *((example.pixels, example.turns) for example in images),
        *((None, tuple(turns)) for turns in texts),
    ]
    compared = 0
    for row, (pixels, turns) in enumerate(rows):
        for number, turn in enumerate(turns, start=1):
            here = (batch.groups[row] == number) & (batch.targets[row] >= 0)
            expected, answer = ordinary_logits(model, tokenizer, turn, pixels)
            assert batch.targets[row][here].tolist() == answer
            assert set(batch.skills[row][here].tolist()) == {SKILLS.index(turn.skill)}
            torch.testing.assert_close(logits[row][here], expected, rtol=0, atol=1e-5)
            compared += 1
    assert compared == 3 * 4 + 2 * 3
    assert int((batch.targets >= 0).sum()) == int((batch.skills >= 0).sum())


@torch.no_grad()
def test_a_turn_sees_its_picture_but_no_other_turn(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast, model: Qwen3VLForConditionalGeneration
) -> None:
    example = mixture.image_example(0)
    packer = Packer(tokenizer, GRID)

    def last_turn_logits(pixels: NDArray[np.uint8], turns: tuple[Turn, ...]) -> Tensor:
        batch = packer.pack([ImageExample(pixels, turns)], [])
        here = (batch.groups[0] == len(turns)) & (batch.targets[0] >= 0)
        logits: Tensor = model.lm_head(packed_hidden(model, batch))[0][here]
        return logits

    last = example.turns[-1]
    other_first = (Turn("question", "which background?", "purple"), last)
    alone = last_turn_logits(example.pixels, (last,))
    torch.testing.assert_close(
        last_turn_logits(example.pixels, example.turns), alone, rtol=0, atol=1e-8
    )
    torch.testing.assert_close(
        last_turn_logits(example.pixels, other_first), alone, rtol=0, atol=1e-8
    )
    assert (last_turn_logits(255 - example.pixels, (last,)) - alone).abs().max() > 1e-2


def test_patchify_equals_the_image_processor() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    theirs = image_processor()(images=[Image.fromarray(one) for one in pixels], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 12, 12]] * 3
    # (x / 255 - 0.5) / 0.5 and x / 127.5 - 1 differ in the last bit of float32 at most.
    torch.testing.assert_close(patchify(pixels), theirs["pixel_values"], rtol=0, atol=2.5e-7)


def test_rows_are_padded_to_few_lengths_and_padding_asks_for_nothing(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = Packer(tokenizer, GRID).pack([mixture.image_example(5)], [[mixture.text_turn(5)]])
    padding = batch.groups < 0
    assert batch.input_ids.shape[1] % 32 == 0
    assert set(batch.targets[padding].tolist()) == {-100}
    assert set(batch.input_ids[padding].tolist()) == {tokenizer.pad_token_id}
    sees = batch.attention_mask()[:, 0]  # (rows, seq, seq): reader, read
    assert not (sees & ~padding[:, :, None] & padding[:, None, :]).any()
    assert sees.any(2).all()  # a row of the softmax without any key would be NaN


def test_a_batch_depends_only_on_its_indices(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    again = Mixture(SceneSampler("train", 0, load_sprites()), num_matches=2, num_questions=1)
    for index in (0, 7, 12_345_678):
        first, second = mixture.image_example(index), again.image_example(index)
        assert np.array_equal(first.pixels, second.pixels)
        assert first.turns == second.turns
        assert mixture.text_turn(index) == again.text_turn(index)


def test_a_match_turn_is_true_exactly_when_its_caption_says_the_scene(mixture: Mixture) -> None:
    counts = {True: 0, False: 0}
    for index in range(60):
        captions = set(explicit_captions(mixture.sampler.scene(index), mixture.sprites))
        for turn in mixture.image_example(index).turns:
            if turn.skill != "match":
                continue
            caption = turn.user.removeprefix("Caption: ").split("\n")[0]
            assert (turn.answer in ("True", "A")) == (caption in captions)
            counts[caption in captions] += 1
    assert min(counts.values()) > 30
