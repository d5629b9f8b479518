"""Batches: which sequences share a forward pass, and how they travel to it."""

from collections.abc import Iterable, Sequence

import torch
from safetensors.torch import load, save

from slq.backbones.prompting import Prompt

_MOST_PADDING = 0.05
_LEAST_FILL = 0.25


def pack_prompts(prompts: Sequence[Prompt], numbers: Sequence[int], dtype: torch.dtype) -> bytes:
    """Token sequences of one batch as safetensors.

    Args:
        prompts: At least one.
        numbers: Which row of the piece each is.
        dtype: Of the weights, to which a model casts its pixels in any case; in half precision they are half as large.
    """
    tensors = {
        "ids": torch.tensor([token for prompt in prompts for token in prompt.ids]),
        "lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "numbers": torch.tensor(list(numbers)),
    }
    seen = [prompt.vision for prompt in prompts if prompt.vision]
    tensors["shown"] = torch.tensor([bool(prompt.vision) for prompt in prompts])
    for name in seen[0] if seen else ():
        parts = [vision[name] for vision in seen]
        joined = torch.cat(parts)
        tensors[f"vision.{name}"] = joined.to(dtype) if joined.is_floating_point() else joined
        tensors[f"sizes.{name}"] = torch.tensor([len(part) for part in parts])
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpack_prompts(data: bytes) -> tuple[list[Prompt], list[int]]:
    """The token sequences of one batch, and which rows of the piece they are."""
    tensors = load(data)
    ids = torch.split(tensors["ids"], tensors["lengths"].tolist())
    vision = {
        name.removeprefix("vision."): iter(
            torch.split(tensor, tensors[f"sizes.{name[7:]}"].tolist())
        )
        for name, tensor in tensors.items()
        if name.startswith("vision.")
    }
    prompts = [
        Prompt(one.tolist(), {name: next(parts) for name, parts in vision.items()} if shown else {})
        for one, shown in zip(ids, tensors["shown"].tolist(), strict=True)
    ]
    return prompts, tensors["numbers"].tolist()


def batches_by_tokens(
    lengths: Sequence[int], shown: Sequence[bool], *, batch_size: int, batch_tokens: int
) -> list[list[int]]:
    """Positions of sequences in batches of similar length, so that little is padded.

    Args:
        lengths: Tokens of each sequence.
        shown: Whether it holds an image; images and texts do not share batches.
        batch_size: Sequences per batch at most.
        batch_tokens: Tokens per batch at most, padding included; a longer sequence has a batch of its own.

    Lengths thin out towards the longest, and there full batches would be padding for the most part: one that is a
    quarter full is closed where another sequence would make more than 5% of it padding.
    """
    order = sorted(range(len(lengths)), key=lambda n: (shown[n], lengths[n]))
    batches: list[list[int]] = []
    tokens = 0  # of the last batch
    for position in order:
        batch, longest = batches[-1] if batches else [], lengths[position]
        size = (len(batch) + 1) * longest
        fits = (
            batch
            and len(batch) < batch_size
            and shown[batch[0]] == shown[position]
            and size <= batch_tokens
            and (
                size - tokens - longest <= _MOST_PADDING * size
                or len(batch) < _LEAST_FILL * batch_size
            )
        )
        if fits:
            batch.append(position)
            tokens += longest
        else:
            batches.append([position])
            tokens = longest
    return batches


def padded(lengths: Iterable[int]) -> int:
    """Tokens of a batch with padding."""
    known = list(lengths)
    return len(known) * max(known)
