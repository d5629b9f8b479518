"""What every backbone offers: a frozen prefix pass over prompts, and a pass of what follows the prefix."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from slq.backbones.attention import use_grouped_attention
from slq.backbones.prompting import Prompt, PromptBuilder, Prompts, PromptSettings
from slq.backbones.vision import VisionFeatures, join_features, split_features
from slq.errors import DataError
from slq.prefix import Prefix

__all__ = ["Backbone", "Prompt", "PromptSettings", "Prompts", "last_places", "prefix_of"]


class Backbone(PromptBuilder):
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
    stacks_features = False  # whether the model wants the features of all images as one tensor
    pads_images = False  # whether an image is put in the middle of a square before it is seen

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
        super().__init__(processor, settings)
        self.name = name
        self.revision = revision
        self.max_pixels = max_pixels
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

    @abstractmethod
    def image_limits(self) -> dict[str, int]:
        """What decides how many pixels and tokens an image gets; part of the fingerprint."""

    @abstractmethod
    def visual_grid(self, vision: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns in which the visual tokens of an image show it, in reading order from its first on.

        Args:
            vision: Of a `Prompt` with one image.

        Raises:
            ConfigError: They do not show it in rows and columns.
        """

    def fit_processor(self) -> None:
        """Make the processor agree with the model and `max_pixels`; called once, when all else is set."""

    # Sizes and identity --------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width of the language model, which is the embedding dimension."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and so the inputs go; the CPU for a model without weights."""
        device: torch.device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

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
            features: Of the images, in the order of the rows and within them, on any device; the vision tower runs
                without them.

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
            mask: (batch, n) bool, False at padding; all real by default.

        Returns:
            (batch, n, hidden) states after the final norm.
        """
        hidden: Tensor = self._followed(prefix, embeds, mask).last_hidden_state
        return hidden

    @torch.no_grad()
    def extended(self, prefix: Prefix, ids: Sequence[Sequence[int]]) -> Prefix:
        """A longer prefix, without gradient: what was computed, and tokens of texts behind it.

        Args:
            prefix: The frozen part, batch rows.
            ids: Tokens that follow in each row, one at least.
        """
        tokens, mask = self.pad(ids)
        output = self._followed(prefix, self.embed_tokens(tokens), mask)
        layers = output.past_key_values.layers
        return Prefix(
            keys=tuple(layer.keys for layer in layers),
            values=tuple(layer.values for layer in layers),
            mask=torch.cat([prefix.mask, mask], dim=1),
            next_position=prefix.next_position + mask.sum(1),
            last_hidden=output.last_hidden_state[last_places(mask)],
            shows_image=prefix.shows_image,
        )

    def _followed(self, prefix: Prefix, embeds: Tensor, mask: Tensor | None) -> Any:
        """The language model's output over what follows a prefix; arguments as `follow`."""
        batch, length = embeds.shape[:2]
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
        steps = mask.long().cumsum(1).sub(1).clamp(min=0)  # padding on either side counts nothing
        positions = (prefix.next_position[:, None] + steps).expand(
            self.position_axes, batch, length
        )
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=torch.cat([prefix.mask, mask], dim=1).long(),
            position_ids=self._for_model(positions),
            past_key_values=prefix.cache(),
            use_cache=True,
        )

    @torch.no_grad()
    def follow_prompts(
        self, prefix: Prefix, prompts: Prompts, features: Sequence[VisionFeatures] | None = None
    ) -> Tensor:
        """Run prompts that follow a prefix and may show further images.

        Args:
            prefix: The frozen part, batch rows.
            prompts: What follows, a row each.
            features: As of `prefix`: of the images in `prompts`.

        Returns:
            (batch, n, hidden) states after the final norm.
        """
        if not prompts.vision:
            return self.follow(prefix, self.embed_tokens(prompts.input_ids), prompts.mask)
        vision = self._vision(prompts) if features is None else self._seen(prompts, features)
        positions = prefix.next_position[None, :, None] + self.positions(prompts)
        output = self.core(
            input_ids=prompts.input_ids,
            attention_mask=torch.cat([prefix.mask, prompts.mask], dim=1).long(),
            position_ids=self._for_model(positions),
            past_key_values=prefix.cache(),
            use_cache=True,
            **vision,
        )
        self._forget()
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def generate(self, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
        """What the model says next, greedily: its own `generate`, with nothing of its generation settings but the end.

        Args:
            prompts: Whole ones, padded on the left.
            max_new_tokens: Tokens at most.

        Returns:
            New tokens of each row, without those from the end of its turn on.

        Raises:
            DataError: A row is padded on the right, where the model would go on.
        """
        if not prompts.mask[:, -1].all():
            raise DataError("what is generated follows the last token; pad prompts on the left")
        ends = self.end_ids
        found: Tensor = self.model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.mask.long(),
            generation_config=_greedy(max_new_tokens, ends, self.tokenizer.pad_token_id),
            **self._vision(prompts),
        )
        self._forget()
        said = found[:, prompts.input_ids.shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in ends, row)) for row in said]

    @property
    def end_ids(self) -> list[int]:
        """Tokens with which a turn ends."""
        own = self.model.generation_config.eos_token_id
        named = [] if own is None else [own] if isinstance(own, int) else list(own)
        begun = self.tokenizer.convert_ids_to_tokens(self.closing_ids[:1])
        closing = [self.closing_ids[0]] if set(begun) <= set(self.special_tokens) else []
        spoken = self.tokenizer.eos_token_id
        return sorted({*named, *closing, *([] if spoken is None else [spoken])})

    def token_logits(self, states: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Logits of some tokens, or of all, float32 or wider whatever the type of the weights.

        Args:
            states: (batch, hidden) after the final norm.
            ids: The tokens; the whole vocabulary by default.

        Returns:
            (batch, num_ids).
        """
        head: Any = self.model.get_output_embeddings()
        kind = torch.promote_types(states.dtype, torch.float32)
        rows = head.weight if ids is None else head.weight[list(ids)]
        logits: Tensor = states.to(kind) @ rows.to(kind).T
        return logits

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
        ends = list(accumulate(given))
        # A row may show several images, so it must end where one of them does.
        if not {*accumulate(wanted)} <= {*ends} or sum(wanted) != sum(given):
            raise DataError(
                f"the images of these prompts take {wanted} tokens, the vision features have {given}; "
                "pass those of the same images, in the order of the rows"
            )
        if not features:
            return {}
        return {
            "mm_encoder_outputs": {"image": join_features(features, stack=self.stacks_features)}
        }

    def _forget(self) -> None:
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


def _greedy(max_new_tokens: int, ends: Sequence[int], padding: int | None) -> GenerationConfig:
    """The likeliest token each time; what is not set here would come from the model's own settings for chats."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(ends),
        pad_token_id=padding or 0,
    )


def last_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of each row's last real token, (batch,) int64 each, for a (batch, seq) bool mask."""
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    return torch.arange(len(last), device=last.device), last


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
