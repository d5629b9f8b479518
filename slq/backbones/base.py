"""What every backbone offers: prompts from items, a frozen prefix pass, and a pass of what follows the prefix.

A prompt is one user turn that holds the image and/or the text, its end, and the opened assistant turn. It is built from
three token runs: `opening` (up to and including the image), `text`, and `closing` (end of turn, assistant opened). So a
long text is cut without touching the closing tokens, and an image prefix can be shared by all that may follow it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from slq.backbones.attention import use_grouped_attention
from slq.backbones.vision import VisionFeatures, join_features, split_features
from slq.errors import DataError
from slq.media import sanitise_text
from slq.prefix import Prefix
from slq.schema import Item

_TEXT_SLOT = "slq text slot"  # stands for the user's text while the chat template is rendered


@dataclass(frozen=True)
class PromptSettings:
    """How items become token sequences; part of the fingerprint.

    Attributes:
        prompt: Instruction after the content; empty in the paper.
        max_text_tokens: Longest caption; more is cut, never the closing tokens.
        padding_side: `right` or `left`; embeddings do not depend on it.
    """

    prompt: str = ""
    max_text_tokens: int = 128
    padding_side: str = "right"


@dataclass(frozen=True)
class Prompts:
    """A padded batch of token sequences with their images.

    Attributes:
        input_ids: (batch, seq) int64.
        mask: (batch, seq) bool.
        vision: Keyword arguments of the model's vision part; empty without images.
    """

    input_ids: Tensor
    mask: Tensor
    vision: dict[str, Tensor] = field(default_factory=dict)


class Backbone(ABC):
    """A frozen multimodal LLM of one family.

    Args:
        model: The loaded model with its language-model head.
        processor: Tokenizer and image processor of the model.
        name: Hub id or folder, as given by the user.
        revision: Commit of the hub id, or a digest of the folder's weights.
        settings: How items become prompts.
        max_pixels: As `load_backbone` was told; an adapter stores it, to be loaded the same way.

    Raises:
        ConfigError: The family cannot follow `max_pixels`.
    """

    position_axes = 1  # M-RoPE families have three
    vision_inputs: tuple[str, ...] = ("pixel_values",)
    image_settings: ClassVar[Mapping[str, Any]] = {}  # what the processor is told with every image
    stacks_features = False  # whether the model wants the features of all images as one tensor

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        name: str,
        revision: str,
        settings: PromptSettings | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        use_grouped_attention(self.decoder)
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.name = name
        self.revision = revision
        self.max_pixels = max_pixels
        self.settings = settings or PromptSettings()
        self.special_tokens = tuple(
            sorted(
                {str(t) for t in self.tokenizer.get_added_vocab()}
                | set(self.tokenizer.all_special_tokens)
            )
        )
        self._opening = {kind: self._render(kind)[0] for kind in (True, False)}
        # A space before the text belongs to its first token ("User: a dog" is "User", ":", " a", " dog").
        plain = self._opening[False].rstrip(" ")
        self._text_lead = self._opening[False][len(plain) :]
        self._plain_ids = self.token_ids(plain)
        self._closing_ids = self.token_ids(self._render(False)[1])
        self.fit_processor()

    # What the family decides ---------------------------------------------------------------------------------

    @property
    def core(self) -> nn.Module:
        """The model without its head: vision tower, projector and language model."""
        core: nn.Module = self.model.model
        return core

    @property
    def decoder(self) -> PreTrainedModel:
        """The causal language model inside, which takes `inputs_embeds` and a cache."""
        core: Any = self.core
        decoder: PreTrainedModel = core.get_decoder()
        return decoder

    @property
    def image_token_id(self) -> int:
        """The placeholder token that one visual feature replaces."""
        return int(self.model.config.image_token_id)

    def positions(self, prompts: Prompts) -> Tensor:
        """(axes, batch, seq) int64 positions of a whole prompt."""
        running = prompts.mask.long().cumsum(1).sub(1).clamp(min=0)
        return running[None]

    def image_arguments(
        self, images: Sequence[Any]
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """Token ids of `opening` with each image's placeholders, and each image's vision arguments.

        The arguments of several images, joined along their first axis, are those of the batch.
        """
        opening = self._opening[True]
        ids, vision = [], []
        for image in images:
            encoded = self.processor(
                text=[opening],
                images=[self.prepared(image)],
                return_tensors="pt",
                **self.image_settings,
            )
            ids.append(encoded["input_ids"][0].tolist())
            vision.append({name: encoded[name] for name in self.vision_inputs})
        return ids, vision

    def prepared(self, image: Image.Image) -> Image.Image:
        """The image as the processor gets it."""
        return image

    @abstractmethod
    def image_limits(self) -> dict[str, int]:
        """What decides how many pixels and tokens an image gets; part of the fingerprint."""

    def fit_processor(self) -> None:  # noqa: B027 - a hook that most families need not have
        """Make the processor agree with the model and `max_pixels`; called once, when all else is set."""

    # Sizes and identity --------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width of the language model, which is the embedding dimension."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the token embedding table, the scale at which latent queries start."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return float(weight.detach().float().std())

    def vision_identity(self) -> dict[str, Any]:
        """What vision features depend on besides the image and the type: all of `identity` but the prompt."""
        config = self.model.config.to_dict()
        for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            config.pop(volatile, None)
        image_processor = self.processor.image_processor.to_dict()
        return {
            "model": self.name,
            "revision": self.revision,
            "config_sha256": _digest(config),
            "image_processor_sha256": _digest(image_processor),
            "image_limits": self.image_limits(),
        }

    def identity(self) -> dict[str, Any]:
        """What the fingerprint says of the backbone: id, revision, configuration, processor, template, settings."""
        return {
            **self.vision_identity(),
            "template_sha256": _digest(
                [self._opening[True], self._opening[False], self._closing_ids]
            ),
            "prompt": self.settings.prompt,
            "max_text_tokens": self.settings.max_text_tokens,
        }

    def weights_sha256(self) -> str:
        """Digest of every parameter and buffer, to show that training left them bit-identical."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    # Prompts -------------------------------------------------------------------------------------------------

    def _render(self, with_image: bool) -> tuple[str, str]:
        content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": _TEXT_SLOT})
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self.processor.chat_template or self.tokenizer.chat_template,
        )
        before, after = str(rendered).split(_TEXT_SLOT)
        return before, after

    def token_ids(self, text: str) -> list[int]:
        """Tokens of trusted text, control tokens included; user text goes through `clean_text` first."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def closing_ids(self) -> list[int]:
        """Tokens that end the user's turn and open the assistant's."""
        return self._closing_ids

    def clean_text(self, text: str) -> str:
        """User text without control tokens, cut to `max_text_tokens`."""
        clean = sanitise_text(text, self.special_tokens)
        ids = self.token_ids(clean)
        limit = self.settings.max_text_tokens
        return clean if len(ids) <= limit else str(self.tokenizer.decode(ids[:limit]))

    def text_ids(self, text: str, *, lead: str = "") -> list[int]:
        """Tokens of `clean_text`, at most `max_text_tokens`, after a `lead` that is joined with its first token."""
        return self.token_ids(lead + self.clean_text(text))[: self.settings.max_text_tokens]

    def prompts(self, items: Sequence[Item], *, close: bool = True) -> Prompts:
        """Token sequences of a batch of items.

        Args:
            items: Texts, images or both, mixed freely.
            close: Whether to end the user's turn and open the assistant's. Without it the result is the open
                image prefix that several questions can follow.
        """
        if not items:
            raise DataError("an empty batch cannot be encoded; pass at least one item")
        pictures = [item.image for item in items if item.image is not None]
        opened, vision = self.image_arguments(pictures) if pictures else ([], [])
        with_image = iter(opened)
        instruction = self.token_ids(self.settings.prompt) if self.settings.prompt else []
        sequences = []
        for item in items:
            shown = item.image is not None
            ids = list(next(with_image)) if shown else list(self._plain_ids)
            if (item.text or "").strip():
                ids += self.text_ids(str(item.text), lead="" if shown else self._text_lead)
            sequences.append(ids + (instruction + self._closing_ids if close else []))
        merged = {
            name: torch.cat([part[name] for part in vision])
            for name in self.vision_inputs
            if vision
        }
        input_ids, mask = self.pad(sequences)
        return Prompts(input_ids, mask, {k: v.to(self.device) for k, v in merged.items()})

    def pad(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(batch, seq) ids and mask of ragged token sequences, padded on the configured side."""
        seq = max(len(ids) for ids in sequences)
        filler = self.tokenizer.pad_token_id or 0
        left = self.settings.padding_side == "left"
        ids = torch.full((len(sequences), seq), int(filler))
        mask = torch.zeros((len(sequences), seq), dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            place = slice(seq - len(sequence), seq) if left else slice(0, len(sequence))
            ids[row, place] = torch.tensor(sequence)
            mask[row, place] = True
        return ids.to(self.device), mask.to(self.device)

    # Passes --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def vision_features(self, prompts: Prompts) -> list[VisionFeatures]:
        """Run the vision tower alone: what `prefix` takes in its place.

        Returns:
            One for each row with an image, in the order of the rows, on the backbone's device. They depend on the
            image and the weights only, so they may be kept, and given with other texts or another batch.
        """
        if not prompts.vision:
            return []
        core: Any = self.core
        return split_features(core.get_image_features(**prompts.vision, return_dict=True))

    @torch.no_grad()
    def prefix(self, prompts: Prompts, features: Sequence[VisionFeatures] | None = None) -> Prefix:
        """Run the frozen model over whole prompts, without gradient and without its head.

        Args:
            prompts: The token sequences with their images.
            features: Of the images, in the order of the rows, on any device; the vision tower runs without them.

        Raises:
            DataError: `features` are not those of the images in `prompts`, by their number or sizes.
        """
        positions = self.positions(prompts)
        vision = self._vision(prompts) if features is None else self._seen(prompts, features)
        output = self.core(
            input_ids=prompts.input_ids,
            attention_mask=prompts.mask.long(),
            position_ids=self._for_model(positions),
            use_cache=True,
            **vision,
        )
        self._forget()
        shows_image = (prompts.input_ids == self.image_token_id).any(1)
        return prefix_of(output, prompts.mask, positions, shows_image)

    def last_states(self, prompts: Prompts) -> Tensor:
        """(batch, hidden) states of the last tokens after the final norm, with gradient into trainable weights."""
        positions = self.positions(prompts)
        output = self.core(
            input_ids=prompts.input_ids,
            attention_mask=prompts.mask.long(),
            position_ids=self._for_model(positions),
            use_cache=False,
            **self._vision(prompts),
        )
        self._forget()
        states: Tensor = output.last_hidden_state[last_places(prompts.mask)]
        return states

    def follow(self, prefix: Prefix, embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run what follows a prefix: latent queries, or the tokens of a question.

        Gradients flow into `embeds`; the prefix stays as it is.

        Args:
            prefix: The frozen part, batch rows.
            embeds: (batch, n, hidden) input embeddings in the model's dtype.
            mask: (batch, n) bool, False at right padding; all real by default.

        Returns:
            (batch, n, hidden) states after the final norm.
        """
        batch, length = embeds.shape[:2]
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
        steps = torch.arange(length, device=embeds.device)
        positions = (prefix.next_position[:, None] + steps).expand(
            self.position_axes, batch, length
        )
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=torch.cat([prefix.mask, mask], dim=1).long(),
            position_ids=self._for_model(positions),
            past_key_values=prefix.cache(),
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Input embeddings (batch, n, hidden) of token ids (batch, n)."""
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds

    def _for_model(self, positions: Tensor) -> Tensor:
        return positions[0] if self.position_axes == 1 else positions

    def _vision(self, prompts: Prompts) -> dict[str, Tensor]:
        return dict(prompts.vision)

    def _seen(self, prompts: Prompts, features: Sequence[VisionFeatures]) -> dict[str, Any]:
        """Model arguments that stand for a vision tower's output."""
        places = (prompts.input_ids == self.image_token_id).sum(1)
        wanted, given = places[places > 0].tolist(), [len(image) for image in features]
        if wanted != given:
            raise DataError(
                f"the images of these prompts take {wanted} tokens, the vision features have {given}; "
                "pass those of the same images, one per row with an image"
            )
        if not features:
            return {}
        return {
            "mm_encoder_outputs": {"image": join_features(features, stack=self.stacks_features)}
        }

    def _forget(self) -> None:  # noqa: B027 - a hook that most families need not have
        """Clear state that a family keeps on the module between calls."""


def prefix_of(output: Any, mask: Tensor, positions: Tensor, shows_image: Tensor) -> Prefix:
    """What a pass with a cache leaves behind.

    Args:
        output: Of the model or its language model: `past_key_values` and `last_hidden_state` (batch, seq, hidden).
        mask: (batch, seq) bool, True at real tokens.
        positions: (axes, batch, seq) int64, as the pass had them.
        shows_image: (batch,) bool, whether a row holds an image.
    """
    furthest = positions.amax(0).masked_fill(~mask, -1).amax(1)
    layers = output.past_key_values.layers
    return Prefix(
        keys=tuple(layer.keys for layer in layers),
        values=tuple(layer.values for layer in layers),
        mask=mask,
        next_position=furthest + 1,
        last_hidden=output.last_hidden_state[last_places(mask)],
        shows_image=shows_image,
    )


def last_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of each row's last real token, (batch,) int64 each, for a (batch, seq) bool mask."""
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    return torch.arange(len(last), device=last.device), last


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
