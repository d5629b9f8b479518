"""Visual enhancement: the feed-forward network of one layer looks at the image again (spec: RetLLM section 3).

`FFN'(x) = alpha * D(x, Z) + (1 - alpha) * FFN(x)` with `D(x, Z) = sum_j act(<x, s1 z_j>) s2 z_j` over the visual
tokens z_j, brought to the size of FFN(x): `s1 = mean|W_gate| / mean|Z|`, `s2 = mean|W_down| / mean|Z|`, means over the
tokens of one image, and each token's sum is scaled to the mean absolute value of its FFN(x). All of it depends on one
row and one token, never on padding or on batch mates.

A token sees the images that have begun before it or at it. So what stands before an image does not depend on it, and
keys and values of a prefix stay those of a whole pass.

It is done by hooks that stay on the model and do nothing, but for the passes of one thread inside `Enhancer.seeing`.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slq.backbones.base import Backbone, last_places
from slq.backbones.vision import VisionFeatures
from slq.config import Section
from slq.errors import ConfigError

_TOP = 10  # tokens whose entropy tells how sure a layer is
# What RetLLM uses of 28 layers, as shares.
_FIRST, _LAST, _STATIC = 6 / 28, 15 / 28, 7 / 28
_NEVER = 2**31  # the number of an image that nothing sees
_LEAST = torch.finfo(torch.float32).tiny  # so that nothing is divided by 0


class EnhancementConfig(Section):
    """When and where a layer looks at the image again."""

    mode: Literal["off", "static", "dynamic"] = "off"
    """`static`: in one layer, always. `dynamic`: in the layer after the first one that is unsure of its answer."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of what is seen; the rest is the feed-forward network's own."""
    positions: Literal["answer", "after_image", "all"] = "answer"
    """Tokens that look: the last one, those that follow an image, or all."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Of `static`; a quarter of the depth if left out."""
    first: Annotated[int, Field(ge=0)] | None = None
    """First layer that `dynamic` asks; 6 of 28 if left out, and as much of another depth."""
    last: Annotated[int, Field(ge=0)] | None = None
    """Last layer that `dynamic` asks; 15 of 28 if left out."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Of `dynamic`: entropy of the ten likeliest answers, as a share of ln 10, above which a layer is unsure."""

    @model_validator(mode="after")
    def _order(self) -> "EnhancementConfig":
        if self.first is not None and self.last is not None and self.first > self.last:
            raise ValueError(f"first ({self.first}) is behind last ({self.last})")
        if self.mode != "static" and self.layer is not None:
            raise ValueError(f"layer belongs to mode static, not {self.mode}")
        for name in ("first", "last", "threshold"):
            if (
                self.mode != "dynamic"
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(f"{name} belongs to mode dynamic, not {self.mode}")
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self.mode != "off" and self.alpha > 0

    @property
    def touches_prefix(self) -> bool:
        """Whether an image prefix is another one than without it."""
        return self.is_on and self.positions != "answer"

    @property
    def needs_whole(self) -> bool:
        """Whether a pair must run in one pass: what the answer triggers would change tokens before it."""
        return self.touches_prefix and self.mode == "dynamic"


class Sight:
    """What the rows of one pass see, and where the trigger fired.

    Args:
        config: Says which tokens look.
        images: Features of the images of each row, in their order, those before this pass included; one at least.
        ids: (batch, n) int64 tokens of this pass.
        mask: (batch, n) bool, False at padding.
        image_token_id: The placeholder of a visual token.
        begun: Images of each row before this pass, (batch,) int64.

    Attributes:
        tokens: (batch, num_tokens, hidden) projected visual tokens, padded with zeros.
        scale: (batch, num_tokens) float32, `1 / mean|Z|` of each token's image; 0 at padding.
        visible: (batch, n, num_tokens) bool, which visual tokens a token sees.
        looks: (batch, n) bool, the tokens that look.
        answer: (batch,) int64, place of each row's last token.
        pending: (batch,) bool, rows that the layer before left unsure.
        fired_at: (batch,) int64, the layer after which a row was unsure for the first time; -1 while it is not.
    """

    def __init__(
        self,
        config: EnhancementConfig,
        images: Sequence[Sequence[VisionFeatures]],
        *,
        ids: Tensor,
        mask: Tensor,
        image_token_id: int,
        begun: Tensor,
    ) -> None:
        self.tokens, self.scale, order = _joined(images, ids.device)
        is_image = ids == image_token_id
        starts = is_image & ~torch.nn.functional.pad(is_image, (1, -1))
        count = begun.to(ids.device)[:, None] + starts.long().cumsum(1)
        self.visible = order[:, None, :] < count[:, :, None]
        self.answer = last_places(mask)[1]
        places = torch.arange(ids.shape[1], device=ids.device)
        looks = {
            "answer": places == self.answer[:, None],
            "after_image": ~is_image,
            "all": torch.ones_like(is_image),
        }[config.positions]
        self.looks = looks & mask & (count > 0)
        self.pending = torch.zeros_like(self.answer, dtype=torch.bool)
        self.fired_at = torch.full_like(self.answer, -1)


def _joined(
    images: Sequence[Sequence[VisionFeatures]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (batch, num_tokens, hidden) of each row, their scales, and the number of each one's image in its row."""
    rows = [torch.cat([image.tokens for image in row]) if row else None for row in images]
    sizes = [[len(image) for image in row] for row in images]
    longest = max(sum(of_row) for of_row in sizes)
    like = next(row for row in rows if row is not None)
    tokens = like.new_zeros(len(rows), longest, like.shape[1]).to(device)
    scale = torch.zeros(tokens.shape[:2], device=device)
    order = torch.full(tokens.shape[:2], _NEVER, device=device)
    for row, of_row in enumerate(images):
        start = 0
        for number, image in enumerate(of_row):
            place = (row, slice(start, start + len(image)))
            tokens[place] = image.tokens.to(device)
            scale[place] = 1 / image.tokens.float().abs().mean().clamp(min=_LEAST)
            order[place] = number
            start += len(image)
    return tokens, scale, order


class Enhancer:
    """Hooks on a backbone that change its passes inside `seeing`, and no others.

    Args:
        backbone: Whose layers look again.
        config: When and where.

    Raises:
        ConfigError: The model has no such layers, or no feed-forward networks with a gate.
    """

    def __init__(self, backbone: Backbone, config: EnhancementConfig) -> None:
        self.config = config
        decoder: Any = backbone.decoder
        self._layers: list[nn.Module] = list(decoder.layers)
        self._norm: nn.Module = decoder.norm
        self._head: Any = backbone.model.get_output_embeddings()
        self.asked, self.changed = self._places(len(self._layers))
        # Hooks hold no reference to this object, so that they go with it.
        self._current: ContextVar[Sight | None] = ContextVar("sight", default=None)
        handles = [
            *(self._hook_network(number, backbone.name) for number in self.changed),
            *(self._hook_layer(number) for number in self.asked),
        ]
        self._removal = weakref.finalize(self, _remove, handles)

    def _places(self, depth: int) -> tuple[list[int], list[int]]:
        """Layers that are asked, and layers that may look."""
        config = self.config
        if not config.is_on:
            return [], []
        if config.mode == "static":
            layer = round(_STATIC * depth) if config.layer is None else config.layer
            asked, changed = [], [layer]
        else:
            first = round(_FIRST * depth) if config.first is None else config.first
            last = round(_LAST * depth) if config.last is None else config.last
            asked = list(range(first, last + 1))
            changed = [number + 1 for number in asked]
        if not changed or changed[-1] >= depth:
            raise ConfigError(
                f"enhancement {config.mode} would change layer {changed[-1] if changed else 'none'}, but the model has "
                f"layers 0 to {depth - 1}; set layer, or first and last, to lower ones"
            )
        return asked, changed

    def _hook_network(self, layer: int, name: str) -> RemovableHandle:
        network: Any = getattr(self._layers[layer], "mlp", None)
        if not all(hasattr(network, part) for part in ("gate_proj", "down_proj", "act_fn")):
            raise ConfigError(f"enhancement needs a gated feed-forward network; {name} has none")
        gate, down = (
            float(part.weight.float().abs().mean())
            for part in (network.gate_proj, network.down_proj)
        )
        looking = partial(_look, self._current, self.config, gate, down)
        handle: RemovableHandle = network.register_forward_hook(looking)
        return handle

    def _hook_layer(self, layer: int) -> RemovableHandle:
        asking = partial(_ask, self._current, self.config.threshold, layer, self._norm, self._head)
        return self._layers[layer].register_forward_hook(asking)

    @contextmanager
    def seeing(self, sight: Sight) -> Iterator[Sight]:
        """Passes of this thread look at these images, until the end of the block.

        Args:
            sight: Of the rows of the pass.
        """
        before = self._current.set(sight)
        try:
            yield sight
        finally:
            self._current.reset(before)

    def close(self) -> None:
        """Take the hooks off the model; they also go when nobody holds this object any more."""
        self._removal()


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _look(
    current: ContextVar[Sight | None],
    config: EnhancementConfig,
    gate: float,
    down: float,
    network: Any,
    arguments: tuple[Tensor, ...],
    own: Tensor,
) -> Tensor | None:
    """After a feed-forward network: what it gives where a token looks again, else its own."""
    sight = current.get()
    if sight is None:
        return None
    looks = sight.looks
    if config.mode == "dynamic":
        looks = looks & sight.pending[:, None]
    rows = torch.arange(len(own), device=own.device)
    only = config.positions == "answer"
    at = (rows, sight.answer) if only else (slice(None), slice(None))

    def chosen(
        tensor: Tensor,
    ) -> Tensor:  # (batch, n, ...) or, of the answer alone, (batch, 1, ...)
        return tensor[at][:, None] if only else tensor

    before = chosen(own)
    seen = retraced(
        chosen(arguments[0]),
        before,
        tokens=sight.tokens,
        scale=sight.scale,
        visible=chosen(sight.visible),
        gate=gate,
        down=down,
        act=network.act_fn,
    )
    mixed = (config.alpha * seen + (1 - config.alpha) * before).to(own.dtype)
    after = torch.where(chosen(looks)[..., None], mixed, before)
    if not only:
        return after
    changed = own.clone()
    changed[at] = after[:, 0]
    return changed


def _ask(
    current: ContextVar[Sight | None],
    threshold: float,
    layer: int,
    norm: Any,
    head: Any,
    _: Any,
    __: Any,
    output: Any,
) -> None:
    """After a layer: which rows it leaves unsure of their answer for the first time."""
    sight = current.get()
    if sight is None:
        return
    states = output if isinstance(output, Tensor) else output[0]
    answers = states[torch.arange(len(states), device=states.device), sight.answer]
    unsure = doubt(head(norm(answers))) > threshold
    sight.pending = unsure & (sight.fired_at < 0)
    sight.fired_at = torch.where(sight.pending, layer, sight.fired_at)


def retraced(
    states: Tensor,
    own: Tensor,
    *,
    tokens: Tensor,
    scale: Tensor,
    visible: Tensor,
    gate: float,
    down: float,
    act: Any,
) -> Tensor:
    """What tokens see, `D(x, Z)`, at the size of their own network's output.

    Args:
        states: (batch, n, hidden), what goes into the network.
        own: (batch, n, hidden), what it gives.
        tokens: (batch, num_tokens, hidden) visual tokens.
        scale: (batch, num_tokens), `1 / mean|Z|`.
        visible: (batch, n, num_tokens) bool.
        gate: `mean|W_gate|`.
        down: `mean|W_down|`.
        act: Of the network.

    Returns:
        (batch, n, hidden), float32 or wider.
    """
    kind = torch.promote_types(states.dtype, torch.float32)
    seen = tokens.to(kind) * scale.to(kind)[:, :, None]
    weights = act(states.to(kind) @ (gate * seen).transpose(1, 2))  # (batch, n, num_tokens)
    found = weights.masked_fill(~visible, 0) @ (down * seen)
    wanted, has = (value.to(kind).abs().mean(-1, keepdim=True) for value in (own, found))
    scaled: Tensor = found * (wanted / has.clamp(min=_LEAST))
    return scaled


def doubt(logits: Tensor) -> Tensor:
    """Entropy of the ten likeliest tokens among themselves, as a share of ln 10: (batch,) in [0, 1].

    Args:
        logits: (batch, vocab).
    """
    log_p = logits.float().topk(_TOP, dim=-1).values.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(_TOP)
