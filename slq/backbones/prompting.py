"""Prompts from items: what a backbone reads, made from a processor and a configuration, without any weights.

A prompt is one user turn that holds the image and/or the text, its end, and the opened assistant turn. It is built from
three token runs: `opening` (up to and including the image), `text`, and `closing` (end of turn, assistant opened). So a
long text is cut without touching the closing tokens, and an image prefix can be shared by all that may follow it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from slq.errors import ConfigError, DataError
from slq.media import sanitise_text
from slq.schema import Item

_TEXT_SLOT = "slq text slot"  # stands for the user's text while the chat template is rendered


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every literal that a tokenizer reads as a token of its own, sorted: what `sanitise_text` must part."""
    added = {str(token) for token in tokenizer.get_added_vocab()}
    return tuple(sorted(added | set(tokenizer.all_special_tokens)))


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
class Prompt:
    """One item's token sequence with its image.

    Attributes:
        ids: Token ids.
        vision: Keyword arguments of the model's vision part for this image alone, on the CPU; empty without one.
            Those of several images, joined along their first axis, are the batch's.
    """

    ids: list[int]
    vision: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


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


def join_vision(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Vision arguments of several images, as of a batch; empty ones count as none."""
    shown = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in shown]) for name in (shown[0] if shown else ())}


class PromptBuilder(ABC):
    """Turns items into token sequences for one model.

    Args:
        processor: Tokenizer and image processor of the model.
        settings: How items become prompts.
    """

    vision_inputs: tuple[str, ...] = ("pixel_values",)
    image_settings: ClassVar[Mapping[str, Any]] = {}  # what the processor is told with every image

    def __init__(self, processor: ProcessorMixin, settings: PromptSettings | None = None) -> None:
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.settings = settings or PromptSettings()
        self.special_tokens = control_tokens(self.tokenizer)
        self._opening = {kind: self._render(kind)[0] for kind in (True, False)}
        # A space before the text belongs to its first token ("User: a dog" is "User", ":", " a", " dog").
        plain = self._opening[False].rstrip(" ")
        self._text_lead = self._opening[False][len(plain) :]
        self._plain_ids = self.token_ids(plain)
        self._closing = self._render(False)[1]
        self._closing_ids = self.token_ids(self._closing)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches go."""

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

    def _render(self, with_image: bool, system: str | None = None) -> tuple[str, str]:
        content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": _TEXT_SLOT})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            spoken = [{"type": "text", "text": system}]
            messages.insert(0, {"role": "system", "content": spoken})
        rendered = self.tokenizer.apply_chat_template(
            messages,
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
    def text_lead(self) -> str:
        """What stands before a text that opens the turn, and is joined with its first token."""
        return self._text_lead

    @property
    def plain_ids(self) -> list[int]:
        """Tokens that open the user's turn when no image does."""
        return self._plain_ids

    def start_ids(self, system: str | None = None) -> list[int]:
        """Tokens that open the user's turn when no image does, as the model's own chat template writes them.

        Args:
            system: Message before the turn, of ours; without one it is the template's own, if it has any.

        Raises:
            ConfigError: The template has no place for a system message.
        """
        if system is None:
            return self._plain_ids
        try:
            before, _ = self._render(False, system)
        except TemplateError as error:  # some templates refuse the role in words of their own
            before = str(error)
        if system not in before:
            raise ConfigError(
                "the chat template of this model has no system role, which a framing with a system message needs; "
                "choose a framing without one, such as true_false"
            )
        return self.token_ids(before.removesuffix(self._text_lead))

    def within_turn(self, opening: Sequence[int]) -> tuple[list[int], str]:
        """What shows an image in the middle of a turn: tokens, and text that stands before the next words.

        Args:
            opening: Tokens that open a turn with it.

        Raises:
            DataError: The family shows images at the start of a turn only.
        """
        start = len(self._plain_ids)
        tail = self._opening[True].rpartition(self.processor.image_token)[2]
        tail_ids = self.token_ids(tail) if tail else []
        end = len(opening) - len(tail_ids)
        if list(opening[:start]) != self._plain_ids or list(opening[end:]) != tail_ids:
            raise DataError(
                "this model shows images at the start of a turn only, so a pair cannot hold a second one"
            )
        return list(opening[start:end]), tail

    @property
    def answer_lead(self) -> str:
        """What an answer's first token begins with: a space, where the turn that is opened does not end in one."""
        return "" if self._closing[-1:].isspace() else " "

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
        return self.collate(self.tokenised(items, close=close))

    def tokenised(self, items: Sequence[Item], *, close: bool = True) -> list[Prompt]:
        """Each item's own token sequence, so that batches can be formed by length; arguments as `prompts`."""
        pictures = [item.image for item in items if item.image is not None]
        opened, vision = self.image_arguments(pictures) if pictures else ([], [])
        shown = iter(zip(opened, vision, strict=True))
        found = []
        for item in items:
            ids, seen = next(shown) if item.image is not None else (self._plain_ids, {})
            found.append(Prompt([*ids, *self.ids_behind_opening(item, close=close)], seen))
        return found

    def ids_behind_opening(self, item: Item, *, close: bool = True) -> list[int]:
        """Tokens of an item that follow those with which its turn opens; arguments as `prompts`."""
        ids = []
        if (item.text or "").strip():
            lead = "" if item.image is not None else self._text_lead
            ids = self.text_ids(str(item.text), lead=lead)
        if not close:
            return ids
        instruction = self.token_ids(self.settings.prompt) if self.settings.prompt else []
        return [*ids, *instruction, *self._closing_ids]

    def collate(self, prompts: Sequence[Prompt], *, padding_side: str | None = None) -> Prompts:
        """A padded batch of token sequences, on the backbone's device.

        Args:
            prompts: One at least.
            padding_side: As of `pad`.

        Raises:
            DataError: There are none.
        """
        if not prompts:
            raise DataError("an empty batch cannot be encoded; pass at least one item")
        vision = [prompt.vision for prompt in prompts if prompt.vision]
        merged = {
            name: torch.cat([part[name] for part in vision]).to(self.device)
            for name in self.vision_inputs
            if vision
        }
        padded = self.pad([prompt.ids for prompt in prompts], padding_side)
        return Prompts(*padded, merged)

    def pad(
        self, sequences: Sequence[Sequence[int]], padding_side: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, seq) ids and mask of ragged token sequences, padded on the configured side or a given one."""
        seq = max(len(ids) for ids in sequences)
        filler = self.tokenizer.pad_token_id or 0
        left = (padding_side or self.settings.padding_side) == "left"
        ids = torch.full((len(sequences), seq), int(filler))
        mask = torch.zeros((len(sequences), seq), dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            place = slice(seq - len(sequence), seq) if left else slice(0, len(sequence))
            ids[row, place] = torch.tensor(sequence)
            mask[row, place] = True
        return ids.to(self.device), mask.to(self.device)
