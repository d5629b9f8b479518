"""Backbones with random weights on the real transformers classes, at any size: for tests and for benchmarks.

No file is read, so a machine without model hub or disk space can measure the shapes of a published model.
"""

from collections.abc import Callable
from functools import partial

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.random_weights.qwen import qwen
from slq.backbones.random_weights.sizes import INTERNVL3_1B, QWEN3_VL_2B, Draw, Sizes
from slq.backbones.random_weights.tiles import intern, llava_onevision, smolvlm
from slq.backbones.random_weights.tokenizers import INTERN_TOKENS, QWEN_TOKENS, byte_level_core
from slq.errors import ConfigError

__all__ = [
    "INTERNVL3_1B",
    "INTERN_TOKENS",
    "QWEN3_VL_2B",
    "QWEN_TOKENS",
    "Draw",
    "Sizes",
    "byte_level_core",
    "random_backbone",
]

_BUILDERS: dict[str, Callable[[Sizes, Draw, PromptSettings | None], Backbone]] = {
    "qwen3_vl": partial(qwen, family="qwen3_vl"),
    "qwen2_5_vl": partial(qwen, family="qwen2_5_vl"),
    "qwen2_vl": partial(qwen, family="qwen2_vl"),
    "internvl": intern,
    "llava_onevision": llava_onevision,
    "smolvlm": partial(smolvlm, family="smolvlm"),
    "idefics3": partial(smolvlm, family="idefics3"),
}


def random_backbone(
    family: str, sizes: Sizes, draw: Draw | None = None, settings: PromptSettings | None = None
) -> Backbone:
    """A backbone of random weights.

    Args:
        family: A key of `slq.backbones.FAMILIES`.
        sizes: Its shape.
        draw: How the weights are drawn.
        settings: How items become prompts.

    Raises:
        ConfigError: The family is unknown.
    """
    if family not in _BUILDERS:
        raise ConfigError(f"family {family!r} is unknown; choose one of {', '.join(_BUILDERS)}")
    return _BUILDERS[family](sizes, draw or Draw(), settings)
