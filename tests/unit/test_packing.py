"""Packed rows equal one ordinary chat per turn, through the processor and the model as they are."""

import dataclasses
import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from slq.pretraining.mixture import GRID, ImageExample, Mixture, Turn, question_turn
from slq.pretraining.model import (
    image_processor,
    packed_hidden,
    patchify,
    spread_positions,
    tiny_config,
)
from slq.pretraining.packing import SKILLS, Packer
from slq.pretraining.tokenizer import IMAGE, build_tokenizer
from slq.scenes import Scene, SceneSampler, explicit_captions, load_sprites, render
from slq.scenes.captions import _sentences, clue_phrase
from slq.scenes.sprites import Sprite


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


def every_clue_caption(scene: Scene, sprites: dict[str, Sprite]) -> set[str]:
    """All captions that give each object of the scene by one of its clues."""
    choices = (sprites[entity.sprite_id].clues for entity in scene.entities)
    return {
        sentence
        for clues in itertools.product(*choices)
        for sentence in _sentences(
            scene,
            lambda entity, clues=clues: clue_phrase(entity, clues[scene.entities.index(entity)]),
        )
    }


def test_a_match_turn_is_true_exactly_when_its_caption_says_the_scene(mixture: Mixture) -> None:
    counts: Counter[tuple[bool, bool]] = Counter()
    for index in range(100):
        scene = mixture.sampler.scene(index)
        named = set(explicit_captions(scene, mixture.sprites))
        clued = every_clue_caption(scene, mixture.sprites)
        for turn in mixture.image_example(index).turns:
            if turn.skill != "match":
                continue
            caption = turn.user.removeprefix("Caption: ").split("\n")[0]
            assert (turn.answer in ("True", "A")) == (caption in named | clued)
            by_clue = " that " in caption or "the " in caption.replace("to the ", "")
            counts[turn.answer in ("True", "A"), by_clue] += 1
    assert len(counts) == 4
    assert min(counts.values()) > 15


def places_seen(mixture: Mixture, index: int) -> list[tuple[float, float]]:
    """Mean (row, column), 0..1, of what each entity adds to the picture; drawn without the others."""
    scene = mixture.sampler.scene(index)
    whole = mixture.image_example(index).pixels.astype(int)
    found = []
    for entity in scene.entities:
        blank = dict(mixture.sprites)
        sprite = blank[entity.sprite_id]
        empty = io.BytesIO()
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(empty, format="PNG")
        blank[entity.sprite_id] = dataclasses.replace(sprite, png=empty.getvalue())
        without = render(scene, blank, mixture.sampler.generator(index, purpose=1)).astype(int)
        rows, columns = np.nonzero(np.abs(whole - without).sum(-1))
        found.append((float(rows.mean()) / 96, float(columns.mean()) / 96))
    return found


def test_answers_about_positions_agree_with_the_pixels(mixture: Mixture) -> None:
    rng = np.random.default_rng(0)
    asked: Counter[str] = Counter()
    for index in range(60):
        scene = mixture.sampler.scene(index)
        names = [mixture.sprites[entity.sprite_id].name for entity in scene.entities]
        places = dict(zip(names, places_seen(mixture, index), strict=True))
        for _ in range(6):
            turn = question_turn(scene, mixture.sprites, rng)
            if where := re.fullmatch(r"where is (.*)\?", turn.user):
                row, column = places[where[1]]
                for word in turn.answer.split():
                    seen = {"above": row < 0.5, "below": row > 0.5, "left": column < 0.5}
                    assert seen.get(word, column > 0.5)
                asked["where"] += 1
            elif beside := re.fullmatch(r"what is (left|right|above|below) of (.*)\?", turn.user):
                axis, sign = {"left": (1, -1), "right": (1, 1), "above": (0, -1), "below": (0, 1)}[
                    beside[1]
                ]
                here = places[beside[2]][axis]
                pair = names[:2]
                other = pair[1 - pair.index(beside[2])]
                stands = sign * (places[other][axis] - here) > 0
                assert (turn.answer == "nothing") == (not stands)
                asked[(turn.answer == "nothing" and "nothing") or "beside"] += 1
    assert min(asked[kind] for kind in ("where", "nothing", "beside")) > 10


def test_every_visual_token_is_asked_for_what_covers_it(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = Packer(tokenizer, GRID).pack([mixture.image_example(n) for n in range(8)], [])
    visual = batch.input_ids == tokenizer.convert_tokens_to_ids(IMAGE)
    asked = batch.targets[visual].view(8, GRID, GRID)
    seen = wanted = 0
    for index in range(8):
        scene = mixture.sampler.scene(index)
        names = [mixture.sprites[entity.sprite_id].name for entity in scene.entities]
        first = [tokenizer.encode(name, add_special_tokens=False)[0] for name in names]
        present = set(asked[index][asked[index] >= 0].tolist())
        assert present <= set(first)  # a small object may fill no token by half
        seen, wanted = seen + len(present), wanted + len(set(first))
        for token, (row, column) in zip(first, places_seen(mixture, index), strict=True):
            if token not in present or first.count(token) > 1:
                continue
            rows, columns = (asked[index] == token).nonzero().float().mean(0).tolist()
            assert abs((rows + 0.5) / GRID - row) < 0.2
            assert abs((columns + 0.5) / GRID - column) < 0.2
    assert seen >= 0.8 * wanted


def test_the_position_table_starts_wide_smooth_and_different_everywhere(
    model: Qwen3VLForConditionalGeneration,
) -> None:
    kept = model.model.visual.pos_embed.weight.detach().clone()
    spread_positions(model, 4.0, seed=0)
    table = model.model.visual.pos_embed.weight.detach().clone()
    model.model.visual.pos_embed.weight.data.copy_(kept)
    assert table.std().item() == pytest.approx(4.0, rel=1e-6)
    apart = torch.cdist(table, table)
    side = 2 * GRID
    grid = table.view(side, side, -1)
    steps = (grid[:, 1:] - grid[:, :-1]).norm(dim=-1).mean()
    assert apart.masked_fill(torch.eye(side**2, dtype=torch.bool), 99).min() > 1
    assert steps < 0.6 * apart[apart > 1].mean()  # of white noise: 1
