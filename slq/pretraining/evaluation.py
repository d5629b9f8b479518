"""What the tiny backbone can do on held-out combinations: say the caption, and tell a match from a hard negative."""

import torch
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from slq.backbones import Backbone
from slq.backbones.loading import load_backbone
from slq.errors import ConfigError
from slq.pretraining.config import PretrainConfig
from slq.pretraining.mixture import GRID, PATCH, ImageExample, Turn, framed_match
from slq.pretraining.model import packed_hidden
from slq.pretraining.packing import Packer
from slq.scenes.captions import explicit_caption, explicit_captions
from slq.scenes.layout import Scene
from slq.scenes.rendering import render
from slq.scenes.sampling import SceneSampler, hard_variants
from slq.scenes.sprites import load_sprites

_CHUNK = 32
_MAX_CAPTION_TOKENS = 48


def evaluate(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainConfig,
    *,
    num_scenes: int,
    split: str = "validation",
) -> dict[str, float]:
    """Held-out accuracies in 0..1.

    Returns:
        `match_accuracy`: true captions accepted and hard variants (one relation, count or size changed) refused,
        balanced, over both trained framings. `caption_accuracy`: greedy captions that say the scene exactly, in
        any of its phrasings.
    """
    sampler = SceneSampler(split, config.seed, load_sprites())  # type: ignore[arg-type]
    scenes = list(sampler.distinct(num_scenes))
    packer = Packer(tokenizer, GRID)
    model.eval()
    correct = asked = said = 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.autocast):
        for start in range(0, num_scenes, _CHUNK):
            chunk = scenes[start : start + _CHUNK]
            right, total = _match_counts(model, tokenizer, packer, sampler, chunk)
            correct, asked = correct + right, asked + total
            said += _exact_captions(model, tokenizer, packer, sampler, chunk)
    return {"match_accuracy": correct / asked, "caption_accuracy": said / num_scenes}


def accuracies_of(
    backbone: str | Backbone, config: PretrainConfig, *, num_scenes: int
) -> dict[str, float]:
    """`evaluate` of a finished backbone on split `test`, in float32: the figures of a model card.

    Args:
        backbone: `tiny`, the folder of a Qwen3-VL that `pretrain` made, or one that is loaded, on the CPU.
        config: The recipe; its seed draws the scenes.
        num_scenes: Distinct scenes.

    Raises:
        ConfigError: The backbone cannot be loaded, or is of another architecture.
    """
    loaded = load_backbone(backbone) if isinstance(backbone, str) else backbone
    if not isinstance(loaded.model, Qwen3VLForConditionalGeneration):
        kind = type(loaded.model).__name__
        raise ConfigError(f"{loaded.name} is a {kind}, no Qwen3-VL of scenes")
    patch = loaded.model.config.vision_config.patch_size
    if patch != PATCH:  # a hub's Qwen3-VL
        raise ConfigError(
            f"{loaded.name} has patches of {patch} px, no Qwen3-VL of scenes ({PATCH})"
        )
    exact = config.model_copy(update={"autocast": False})
    return evaluate(loaded.model, loaded.tokenizer, exact, num_scenes=num_scenes, split="test")


def _match_counts(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    packer: Packer,
    sampler: SceneSampler,
    scenes: list[tuple[int, Scene]],
) -> tuple[int, int]:
    sprites = sampler.sprites
    examples = []
    for index, scene in scenes:
        rng = sampler.generator(index, purpose=4)
        turns: list[Turn] = []
        for _ in range(2):
            variants = hard_variants(scene)
            wrong = variants[int(rng.integers(len(variants)))]
            turns.append(framed_match(scene, True, sprites, rng, explicit_caption))
            turns.append(framed_match(wrong, False, sprites, rng, explicit_caption))
        pixels = render(scene, sprites, sampler.generator(index, purpose=1))
        examples.append(ImageExample(pixels, tuple(turns)))
    batch = packer.pack(examples, [])
    logits = model.lm_head(packed_hidden(model, batch)).float()
    words = ("True", "False", "A", "B")
    ids = {word: int(tokenizer.convert_tokens_to_ids(word)) for word in words}
    partner = {
        ids["True"]: ids["False"],
        ids["False"]: ids["True"],
        ids["A"]: ids["B"],
        ids["B"]: ids["A"],
    }
    correct = asked = 0
    for row, column in (batch.targets >= 0).nonzero().tolist():
        answer = int(batch.targets[row, column])
        if answer in partner:
            correct += int(logits[row, column, answer] > logits[row, column, partner[answer]])
            asked += 1
    return correct, asked


def _exact_captions(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    packer: Packer,
    sampler: SceneSampler,
    scenes: list[tuple[int, Scene]],
) -> int:
    """Greedy captions without a cache: the packed forward is the oracle here, and a step is cheap."""
    captions = [""] * len(scenes)
    done = [False] * len(scenes)
    end = int(tokenizer.eos_token_id)
    pictures = [
        render(scene, sampler.sprites, sampler.generator(index, purpose=1))
        for index, scene in scenes
    ]
    tokens: list[list[int]] = [[] for _ in scenes]
    for _ in range(_MAX_CAPTION_TOKENS):
        examples = [
            ImageExample(pixels, (Turn("caption", "", caption),))
            for pixels, caption in zip(pictures, captions, strict=True)
        ]
        batch = packer.pack(examples, [])
        last = (batch.groups >= 0).sum(1) - 1  # the answer's last token predicts the next one
        hidden = packed_hidden(model, batch)[torch.arange(len(scenes)), last]
        following = model.lm_head(hidden).argmax(-1).tolist()
        for number, token in enumerate(following):
            if token == end:
                done[number] = True
            if not done[number]:
                tokens[number].append(token)
                captions[number] = tokenizer.decode(tokens[number])
        if all(done):
            break
    return sum(
        caption in explicit_captions(scene, sampler.sprites)
        for caption, (_, scene) in zip(captions, scenes, strict=True)
    )
