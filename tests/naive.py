"""The slow way: whole sequences through the whole model, one by one, no cache, no padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slq.backbones.base import Backbone
from slq.backbones.intern_vl import pad_to_square
from slq.schema import Item

_GRID_MERGE = 2


def chat_inputs(
    backbone: Backbone, item: Item, *, add_generation_prompt: bool = True
) -> dict[str, Tensor]:
    """What the processor itself makes of the item as one user turn.

    An image alone stands beside an empty text, as its prefix is shared with all texts that may follow.
    """
    content: list[dict[str, Any]] = [] if item.image is None else [{"type": "image"}]
    content.append({"type": "text", "text": item.text or ""})
    rendered = backbone.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    if item.image is None:
        encoded = backbone.processor(text=[rendered], return_tensors="pt")
    elif family_of(backbone) == "llava_onevision":
        encoded = _first_of_two_images(backbone, rendered, item.image)
    else:
        image = pad_to_square(item.image) if is_intern(backbone) else item.image
        encoded = backbone.processor(
            text=[rendered],
            images=[image],
            return_tensors="pt",
            **_ONE_TILE.get(family_of(backbone), {}),
        )
    return {name: value for name, value in encoded.items() if name in _MODEL_INPUTS}


_MODEL_INPUTS = (
    "input_ids", "pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "batch_num_images",
)  # fmt: skip
_ONE_TILE: dict[str, dict[str, Any]] = {
    "internvl": {"crop_to_patches": False},
    "smolvlm": {"do_image_splitting": False},
    "idefics3": {"do_image_splitting": False},
}


def _first_of_two_images(backbone: Backbone, rendered: str, image: Image.Image) -> dict[str, Any]:
    """A turn of two images as the processor writes it, with the second image struck out again."""
    token = backbone.processor.image_token
    encoded = backbone.processor(
        text=[rendered.replace(token, token * 2)], images=[[image, image]], return_tensors="pt"
    )
    ids = encoded["input_ids"][0]
    places = (ids == backbone.image_token_id).nonzero()[:, 0]
    ids = torch.cat([ids[: places[len(places) // 2]], ids[places[-1] + 1 :]])
    return {
        "input_ids": ids[None],
        "pixel_values": encoded["pixel_values"][:1],
        "image_sizes": encoded["image_sizes"][:1],
        "batch_num_images": encoded["batch_num_images"],
    }


def family_of(backbone: Backbone) -> str:
    """The family as transformers names it."""
    return str(backbone.model.config.model_type)


def is_intern(backbone: Backbone) -> bool:
    """Whether the backbone belongs to the InternVL family."""
    return family_of(backbone) == "internvl"


def written_out_positions(
    backbone: Backbone, inputs: dict[str, Tensor], num_following: int
) -> Tensor:
    """Positions of one sequence and of what follows it, built by hand.

    Returns:
        (3, 1, seq) for the M-RoPE of Qwen-VL: an image of rows x columns tokens keeps its temporal axis still
        and takes max(rows, columns) positions. (1, seq) for all others, which count every token.
    """
    ids = inputs["input_ids"][0].tolist()
    if not family_of(backbone).startswith("qwen"):
        return torch.arange(len(ids) + num_following)[None]
    triples: list[tuple[int, int, int]] = []
    position = index = shown = 0
    while index < len(ids):
        if ids[index] != backbone.image_token_id:
            triples.append((position, position, position))
            position, index = position + 1, index + 1
            continue
        _, height, width = inputs["image_grid_thw"][shown].tolist()
        shown += 1
        rows, columns = height // _GRID_MERGE, width // _GRID_MERGE
        triples += [
            (position, position + r, position + c) for r in range(rows) for c in range(columns)
        ]
        position, index = position + max(rows, columns), index + rows * columns
    triples += [(position + step,) * 3 for step in range(num_following)]
    return torch.tensor(triples).T[:, None, :]


def naive_hidden(
    backbone: Backbone, item: Item, following: Tensor, positions: Tensor | None = None
) -> Tensor:
    """States after the final norm, (seq + n, hidden), of prompt and `following` (n, hidden)."""
    inputs = chat_inputs(backbone, item)
    embeds = backbone.model.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.cat([embeds, following[None].to(embeds.dtype)], dim=1)
    if positions is None:
        positions = written_out_positions(backbone, inputs, len(following))
    vision = {name: value for name, value in inputs.items() if name != "input_ids"}
    output = backbone.model.model(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        position_ids=positions,
        use_cache=False,
        **vision,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def naive_embedding(backbone: Backbone, item: Item, latents: Tensor) -> Tensor:
    """The paper's embedding, (hidden,): append the latents, run everything, average, normalise."""
    states = naive_hidden(backbone, item, latents)[-len(latents) :]
    mean = states.sum(0) / len(latents)
    return mean / (mean * mean).sum().sqrt()


def naive_logits(backbone: Backbone, item: Item) -> Tensor:
    """(vocab,) logits of the token after the whole prompt, from one ordinary pass with the head."""
    return _next_logits(backbone, chat_inputs(backbone, item))


def _next_logits(backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
    vision = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        output = backbone.model(
            input_ids=inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            position_ids=written_out_positions(backbone, inputs, 0),
            use_cache=False,
            **vision,
        )
    logits: Tensor = output.logits[0, -1]
    return logits


Content = Sequence[str | Image.Image]


def turn_inputs(backbone: Backbone, content: Content) -> dict[str, Tensor]:
    """What the processor itself makes of texts and any number of images as one user turn (Qwen-VL and InternVL)."""
    return chat_of(backbone, {"user": content})


def chat_of(backbone: Backbone, said: Mapping[str, Content]) -> dict[str, Tensor]:
    """As `turn_inputs`, for one message of each role."""
    messages = [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in content
            ],
        }
        for role, content in said.items()
    ]
    rendered = backbone.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    images = [part for content in said.values() for part in content if not isinstance(part, str)]
    if is_intern(backbone):
        images = [pad_to_square(image) for image in images]
    shown: dict[str, Any] = {"images": images} if images else {}
    encoded = backbone.processor(
        text=[rendered], return_tensors="pt", **shown, **_ONE_TILE.get(family_of(backbone), {})
    )
    return {name: value for name, value in encoded.items() if name in _MODEL_INPUTS}


def turn_logits(backbone: Backbone, content: Content) -> Tensor:
    """(vocab,) logits of the token after a turn, from one ordinary pass with the head."""
    return chat_logits(backbone, {"user": content})


def chat_logits(backbone: Backbone, said: Mapping[str, Content]) -> Tensor:
    """As `turn_logits`, for one message of each role."""
    return _next_logits(backbone, chat_of(backbone, said))
