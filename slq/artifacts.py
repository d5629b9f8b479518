"""Stored artefacts: adapter folders, manifests and the fingerprint that ties them together."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from slq.backbones.base import Backbone, PromptSettings
from slq.config import Section
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError
from slq.files import read_json, write_json
from slq.finetuning import TunedBackbone
from slq.latent_queries import LatentQueries, Pooling

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


Adapter = LatentQueries | TunedBackbone
"""What can be trained; its parameters with `requires_grad` are what an adapter folder holds."""


class AdapterConfig(Section):
    """`adapter_config.json`: everything needed to embed as the adapter was trained."""

    slq_type: Literal["SLQ", "LORA", "FULL"] = "SLQ"
    """Latent queries, or a baseline that changes the model."""
    base_model_name_or_path: str
    """Hub id, folder, or `tiny`."""
    revision: str
    """Commit of the hub id, or a digest of the folder's weights."""
    num_latents: Annotated[int, Field(ge=0)]
    """0 for the baselines."""
    lora_rank: int | None = None
    lora_alpha: float | None = None
    hidden_size: Annotated[int, Field(gt=0)]
    pooling: Literal["mean", "last", "last_token"] = "mean"
    """Mean of the latents, the last latent, or the last token of a baseline."""
    sets: Literal["shared", "separate"] = "shared"
    """Whether texts have latents of their own."""
    norm: Literal["l2"] = "l2"
    prompt: str = ""
    max_text_tokens: int = 128
    temperature: float
    """Learned divisor of similarities."""
    max_pixels: int | None = None
    image_limits: dict[str, int] = Field(default_factory=dict)
    """Pixels and tokens that an image may get; a backbone with others is refused."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the backbone's weights that the fingerprint speaks of."""
    fingerprint: str = ""


def fingerprint(backbone: Backbone, adapter: Adapter | None) -> str:
    """sha256 that names an embedding space: backbone, processor, template, adapter tensors, pooling, dimension, dtype.

    Args:
        backbone: The model.
        adapter: None for the zero-shot last token.
    """
    identity: dict[str, Any] = backbone.identity()
    identity["pooling"] = "last_token" if adapter is None else adapter.pooling
    identity["dimension"] = backbone.hidden_size
    identity["dtype"] = str(backbone.dtype)
    if isinstance(adapter, LatentQueries):
        identity["latents_sha256"] = hashlib.sha256(_weights(adapter)).hexdigest()
    elif adapter is not None:
        identity["tuned_sha256"] = hashlib.sha256(_weights(adapter)).hexdigest()
        identity["lora_scale"] = adapter.alpha / adapter.rank if adapter.method == "lora" else None
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def vision_fingerprint(backbone: Backbone) -> str:
    """sha256 that names what stored vision features depend on; a changed prompt leaves them valid."""
    identity = {**backbone.vision_identity(), "dtype": str(backbone.dtype)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def trained_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The trained tensors by name, as they are, on their device."""
    return {
        name: value.detach() for name, value in adapter.named_parameters() if value.requires_grad
    }


def _weights(adapter: Adapter) -> bytes:
    # an engine may have made the temperature bfloat16 with all the rest; a loaded adapter has it in float32
    tensors = {
        name: value.to("cpu", torch.float32 if _is_own(adapter, name) else value.dtype).contiguous()
        for name, value in trained_tensors(adapter).items()
    }
    return save(tensors)


def _is_own(adapter: Adapter, name: str) -> bool:
    """Whether a tensor is the adapter's own and not one of the backbone's weights."""
    return isinstance(adapter, LatentQueries) or name == "log_temperature"


def save_adapter(folder: Path, backbone: Backbone, adapter: Adapter, *, card: str = "") -> Path:
    """Write an adapter folder; it appears complete or not at all.

    Args:
        folder: Replaced if it exists.
        backbone: What the adapter belongs to.
        adapter: The trained part.
        card: Extra text for the model card, such as results.

    Raises:
        StorageError: The folder cannot be written.
    """
    config = AdapterConfig(
        base_model_name_or_path=backbone.name,
        revision=backbone.revision,
        **_kind_of(adapter),
        hidden_size=backbone.hidden_size,
        prompt=backbone.settings.prompt,
        max_text_tokens=backbone.settings.max_text_tokens,
        temperature=float(adapter.temperature.detach()),
        max_pixels=backbone.max_pixels,
        image_limits=backbone.image_limits(),
        dtype=str(backbone.dtype).removeprefix("torch."),  # type: ignore[arg-type] # pydantic checks it
        fingerprint=fingerprint(backbone, adapter),
    )
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / ADAPTER_WEIGHTS).write_bytes(_weights(adapter))
        write_json(partial / ADAPTER_CONFIG, config.model_dump())
        (partial / "README.md").write_text(_model_card(config, adapter, card))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"adapter {folder} cannot be written: {error}; free space or choose another folder"
        ) from None
    return folder


def load_adapter_config(folder: Path) -> AdapterConfig:
    """Read and validate an adapter's configuration.

    Raises:
        ArtifactError: There is no adapter in `folder`.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing; run `slq train` first"
        )
    config = AdapterConfig.parse(read_json(path), source=str(path))
    assert isinstance(config, AdapterConfig)
    return config


def _kind_of(adapter: Adapter) -> dict[str, Any]:
    if isinstance(adapter, LatentQueries):
        named = {"num_latents": adapter.num_latents, "pooling": adapter.pooling}
        return {"slq_type": "SLQ", **named, "sets": adapter.sets}
    kind = {"slq_type": adapter.method.upper(), "num_latents": 0, "pooling": adapter.pooling}
    if adapter.method == "lora":
        kind |= {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}
    return kind


def load_adapter(folder: Path, backbone: Backbone) -> Adapter:
    """The trained part of an adapter folder, checked against the backbone it is used with.

    Args:
        folder: As written by `save_adapter`.
        backbone: Of a baseline it is changed in place.

    Raises:
        ArtifactError: The folder is incomplete.
        ArtifactMismatchError: The adapter was trained on another backbone; both fingerprints are named.
    """
    config = load_adapter_config(folder)
    if config.hidden_size != backbone.hidden_size:
        raise ArtifactMismatchError(
            f"adapter {folder} has width {config.hidden_size}, backbone {backbone.name} has {backbone.hidden_size}"
        )
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ArtifactError(f"{folder} is incomplete: {ADAPTER_WEIGHTS} is missing")
    # A fingerprint names one weight type; the same adapter may be run in another one.
    mismatch = bool(config.fingerprint) and config.revision != backbone.revision
    if mismatch and config.slq_type != "SLQ":
        raise ArtifactMismatchError(
            f"adapter {folder} was trained on {config.base_model_name_or_path} at {config.revision}; "
            f"backbone {backbone.name} is at {backbone.revision}"
        )
    if config.image_limits not in ({}, backbone.image_limits()):
        raise ArtifactMismatchError(
            f"adapter {folder} was trained with image limits {config.image_limits}; "
            f"backbone {backbone.name} has {backbone.image_limits()}; load it with those of the adapter"
        )
    adapter = _empty(config, backbone)
    load_trained(adapter, path)
    adapter.to(backbone.device)
    if mismatch:
        raise ArtifactMismatchError(
            f"adapter {folder} has fingerprint {config.fingerprint} on {config.base_model_name_or_path} at "
            f"{config.revision}; with backbone {backbone.name} at {backbone.revision} it would be "
            f"{fingerprint(backbone, adapter)}"
        )
    return adapter


def _empty(config: AdapterConfig, backbone: Backbone) -> Adapter:
    if config.slq_type == "SLQ":
        pooling: Pooling = "last" if config.pooling == "last" else "mean"
        return LatentQueries(
            config.num_latents, config.hidden_size, pooling=pooling, sets=config.sets
        )
    return TunedBackbone(
        backbone,
        "lora" if config.slq_type == "LORA" else "full",
        rank=config.lora_rank or 1,
        alpha=config.lora_alpha or 1.0,
    )


def load_trained(adapter: Adapter, path: Path) -> None:
    """Copy the tensors of a safetensors file into the trained part, all of them.

    Raises:
        ArtifactError: The file is damaged, or holds other tensors.
    """
    wanted = trained_tensors(adapter)
    try:
        found = load_file(path)
        if found.keys() != wanted.keys():
            different = sorted(found.keys() ^ wanted.keys())
            raise ArtifactError(f"{path} is damaged: tensors {different[:3]} do not fit")
        with torch.no_grad():
            for name, tensor in wanted.items():
                if tensor.shape != found[name].shape:
                    raise ArtifactError(
                        f"{path} is damaged: {name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
                    )
                tensor.copy_(found[name])
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def settings_of(config: AdapterConfig) -> PromptSettings:
    """Prompt settings that an adapter was trained with."""
    return PromptSettings(prompt=config.prompt, max_text_tokens=config.max_text_tokens)


def require_same_fingerprint(
    expected: str, found: str, *, expected_in: str, found_in: str, remedy: str
) -> None:
    """Refuse artefacts of different embedding spaces.

    Raises:
        ArtifactMismatchError: The fingerprints differ; both are named.
    """
    if expected != found:
        raise ArtifactMismatchError(
            f"{expected_in} was built with fingerprint {expected}, but {found_in} has {found}; {remedy}"
        )


def _model_card(config: AdapterConfig, adapter: Adapter, card: str) -> str:
    count = sum(tensor.numel() for tensor in trained_tensors(adapter).values())
    if isinstance(adapter, LatentQueries):
        title = "Shared latent queries"
        text = (
            f"{config.num_latents} latent queries of width {config.hidden_size} ({count - 1:,} values) and\n"
            f"one temperature ({config.temperature:.4f}). The backbone (revision `{config.revision}`) is frozen\n"
            "and unchanged."
        )
    else:
        title = "LoRA" if adapter.method == "lora" else "Full fine-tuning"
        text = (
            f"{count:,} trained values, the temperature ({config.temperature:.4f}) among them, over the backbone's\n"
            f"revision `{config.revision}`; the embedding is the last token's state. A baseline of SLQ."
        )
    return f"""---
base_model: {config.base_model_name_or_path}
library_name: slq
tags: [retrieval, multimodal, latent-queries]
---
# {title} for {config.base_model_name_or_path}

{text}

```python
from slq import Encoder
encoder = Encoder.from_pretrained("PATH_TO_THIS_FOLDER")
vectors = encoder.encode(["a red apple"])   # (1, {config.hidden_size}) float32, unit norm
```

Fingerprint: `{config.fingerprint}` (torch {torch.__version__.split("+")[0]})

{card}"""
