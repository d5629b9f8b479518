"""Images as 8-bit levels on their way to the model: a quarter of float32's bytes, and normalised where the model is.

Rescaling and normalising give each of the 256 levels of a channel one number. So who prepares images only scales and
cuts them; the numbers are looked up when a batch is on the model's device, in a table that is read off the processor
itself. Nothing of this may change a bit: a processor that does anything else keeps its own, slower way.
"""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slq.backbones.prompting import Prompt, PromptBuilder, Prompts
from slq.errors import DataError

_LEVELS, _CHANNELS = 256, 3
_PIXELS = "pixel_values"


class LevelImages(PromptBuilder):
    """A family whose processor does nothing to an image but to scale, to normalise and to cut it."""

    @property
    @abstractmethod
    def probe_side(self) -> int:
        """Side of a square image, in pixels, that the processor leaves as large as it is; 16 at least."""

    @abstractmethod
    def levels(self, image: Image.Image) -> tuple[Hashable, dict[str, Tensor]]:
        """An image as the vision part gets it, but not normalised.

        Returns:
            What its placeholder tokens depend on, and its vision arguments; `pixel_values` are uint8, and the values of
            a row or an image come one channel after the other.
        """

    def image_arguments(
        self, images: Sequence[Any]
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """See `PromptBuilder.image_arguments`; `pixel_values` are levels, which `collate` turns into numbers."""
        if self._table is None:
            return super().image_arguments(images)
        ids, vision = [], []
        for image in images:
            layout, levels = self.levels(image)
            if layout not in self._openings:
                ((opening,), _) = super().image_arguments([image])
                self._openings[layout] = opening
            ids.append(list(self._openings[layout]))
            vision.append(levels)
        return ids, vision

    def collate(self, prompts: Sequence[Prompt], *, padding_side: str | None = None) -> Prompts:
        """See `PromptBuilder.collate`.

        Raises:
            DataError: There are none; or they come from a processor that could be followed, and this one cannot.
        """
        batch = super().collate(prompts, padding_side=padding_side)
        pixels = batch.vision.get(_PIXELS)
        if pixels is None or pixels.dtype != torch.uint8 or len(pixels) == 0:
            return batch  # there are none where all images have been seen before
        if self._table is None:
            raise DataError(
                "images were prepared by another version of the model's image processor than the encoder has; "
                "install the same versions of transformers and pillow on all machines"
            )
        values = normalised(pixels, self._table.to(pixels.device))
        return replace(batch, vision={**batch.vision, _PIXELS: values})

    @cached_property
    def _openings(self) -> dict[Hashable, list[int]]:
        """Tokens up to and including the image, by what they depend on."""
        return {}

    @cached_property
    def _table(self) -> Tensor | None:
        """(3, 256) float32 number of each level; None where the processor cannot be followed bit for bit."""
        probes = _probes(self.probe_side)
        ours = [self.levels(probe)[1] for probe in probes]
        try:
            _, theirs = super().image_arguments(probes)
        except ValueError:  # it does not even take pictures of these sizes
            return None
        table = table_of(ours[0][_PIXELS], theirs[0][_PIXELS])
        if table is None:
            return None
        for levels, wanted in zip(ours, theirs, strict=True):
            values = normalised(levels[_PIXELS], table)
            if not all(
                torch.equal(one, values if name == _PIXELS else levels[name])
                for name, one in wanted.items()
            ):
                return None
        return table


def _probes(side: int) -> list[Image.Image]:
    """A picture that shows every level of each channel, then some that must be scaled."""
    places = np.arange(side) * 16 // side
    ramp = (16 * places[:, None] + places[None, :]).astype(np.uint8)
    shown = np.stack([ramp, 255 - ramp, ramp + np.uint8(85)], axis=2)
    noise = np.random.default_rng(0)
    sizes = ((side, side), (3 * side // 2, side), (side - 5, 2 * side + 3), (side // 2, side // 2))
    return [
        Image.fromarray(shown),
        *(
            Image.fromarray(noise.integers(0, _LEVELS, (rows, columns, 3), dtype=np.uint8))
            for rows, columns in sizes
        ),
    ]


def table_of(levels: Tensor, values: Tensor) -> Tensor | None:
    """(3, 256) number of each level of each channel; None where the shapes differ or a level is not shown.

    Args:
        levels: (n, 3, ...) or (n, 3 * m) uint8.
        values: What became of them, of the same shape.
    """
    if levels.shape != values.shape:
        return None
    table = torch.full((_CHANNELS, _LEVELS), torch.nan)
    shown = levels.reshape(len(levels), _CHANNELS, -1).long()
    found = values.reshape(len(values), _CHANNELS, -1).float()
    for channel in range(_CHANNELS):
        table[channel, shown[:, channel]] = found[:, channel]
    return None if bool(table.isnan().any()) else table


def normalised(levels: Tensor, table: Tensor) -> Tensor:
    """The number of each level, in the type of `table` and the shape of `levels`.

    Args:
        levels: (n, 3, ...) or (n, 3 * m) uint8.
        table: (3, 256), on the same device.
    """
    channels = torch.arange(_CHANNELS, dtype=torch.int32, device=levels.device)[:, None]
    places = levels.reshape(len(levels), _CHANNELS, -1).int() + _LEVELS * channels
    return table.flatten().index_select(0, places.flatten()).view(levels.shape)


def channels_first(image: Image.Image) -> NDArray[np.uint8]:
    """(3, height, width) levels of an RGB picture."""
    return np.asarray(image).transpose(2, 0, 1)
