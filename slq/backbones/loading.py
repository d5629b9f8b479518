"""Loads a backbone of any supported family, with or without torchvision."""

import hashlib
import importlib.util
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    ProcessorMixin,
)
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.decoder_vlm import LlavaOnevisionBackbone, SmolVLMBackbone
from slq.backbones.intern_vl import InternVLBackbone
from slq.backbones.qwen_vl import QwenVLBackbone
from slq.errors import ConfigError, HardwareError

FAMILIES: dict[str, tuple[type[Backbone], type[ProcessorMixin]]] = {
    "qwen3_vl": (QwenVLBackbone, Qwen3VLProcessor),
    "qwen2_5_vl": (QwenVLBackbone, Qwen2_5_VLProcessor),
    "qwen2_vl": (QwenVLBackbone, Qwen2VLProcessor),
    "internvl": (InternVLBackbone, InternVLProcessor),
    "llava_onevision": (LlavaOnevisionBackbone, LlavaOnevisionProcessor),
    # SmolVLM's own processor needs num2words for videos; with images both write the same
    "smolvlm": (SmolVLMBackbone, Idefics3Processor),
    "idefics3": (SmolVLMBackbone, Idefics3Processor),
}
"""Supported `model_type`s with our family and the processor of the model's own code."""

TINY = "tiny"
_SAMPLE_BYTES = 2**20


def tiny_folder() -> Path:
    """Where the shipped backbone lies."""
    return Path(str(resources.files("slq.backbones").joinpath("weights/tiny")))


def load_backbone(
    name: str = TINY,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_pixels: int | None = None,
    settings: PromptSettings | None = None,
    weights: bool = True,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: `tiny`, a folder, or a hub id such as `Qwen/Qwen3-VL-2B-Instruct`.
        revision: Commit of a hub id; pin it for reproducible fingerprints.
        device: `cpu` or `cuda[:n]`; a GPU that is absent is an error, never a silent CPU run.
        dtype: `float32`, `bfloat16` or `float16`.
        max_pixels: Largest image area handed to a Qwen-VL vision tower; its processor's default otherwise. The
            other families see one tile of their model's size.
        settings: How items become prompts.
        weights: Without them it only builds prompts, and takes no memory to speak of.

    Raises:
        ConfigError: The model cannot be found, its family is not supported, or cannot follow `max_pixels`.
        HardwareError: `device` names a GPU that is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HardwareError(
            f"device {device!r} was asked for, but torch sees no CUDA GPU; use device: cpu"
        )
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of float32, bfloat16, float16")
    source = str(tiny_folder()) if name == TINY else name
    config = _config(name, source, revision)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"backbone {name!r} is of family {config.model_type!r}; supported: {known}"
        )
    family, processor_class = FAMILIES[config.model_type]
    if weights:
        model = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=getattr(torch, dtype)
        ).to(device)
    else:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    processor = load_processor(source, processor_class, revision=revision)
    return family(
        model,
        processor,
        name=name,
        revision=_revision(source, config, revision),
        settings=settings,
        max_pixels=max_pixels,
    )


def backbone_revision(name: str = TINY, revision: str | None = None) -> str:
    """The revision that `load_backbone` would record, without loading any weights.

    Raises:
        ConfigError: The model cannot be found.
    """
    source = str(tiny_folder()) if name == TINY else name
    return _revision(source, _config(name, source, revision), revision)


def backbone_hidden_size(name: str = TINY, revision: str | None = None) -> int:
    """The width of the language model, which is the embedding's, without loading any weights.

    Raises:
        ConfigError: The model cannot be found.
    """
    config = _config(name, str(tiny_folder()) if name == TINY else name, revision)
    return int(config.get_text_config().hidden_size)


def _config(name: str, source: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone {name!r} cannot be loaded: {error}") from None


def load_processor(
    source: str, processor_class: type[ProcessorMixin], *, revision: str | None
) -> ProcessorMixin:
    """The model's processor; without torchvision, the same class less its video part.

    transformers 5.23 builds video processors on torchvision and fails without it, though we never pass a video.
    """
    if importlib.util.find_spec("torchvision") is None:
        processor_class = without_video(processor_class)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor: ProcessorMixin = processor_class.from_pretrained(source, revision=revision)
    return processor


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A subclass that consists of an image processor and a tokenizer only."""

    def get_attributes(_: type[ProcessorMixin]) -> list[str]:
        return ["image_processor", "tokenizer"]

    members: dict[str, Any] = {
        "get_attributes": classmethod(get_attributes),
        "video_processor": None,
    }
    return type(processor_class.__name__, (processor_class,), members)


def _revision(source: str, config: Any, revision: str | None) -> str:
    commit = getattr(config, "_commit_hash", None) or revision
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            for start in range(0, size, max(_SAMPLE_BYTES, size // 16)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()}"
