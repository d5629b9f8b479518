"""Stored artefacts: adapter folders, manifests and the fingerprint that ties them together."""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from slq.backbones.base import Backbone, PromptSettings
from slq.config import Section
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError
from slq.latent_queries import LatentQueries

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class AdapterConfig(Section):
    """`adapter_config.json`: everything needed to embed as the adapter was trained."""

    slq_type: Literal["SLQ"] = "SLQ"
    base_model_name_or_path: str
    """Hub id, folder, or `tiny`."""
    revision: str
    """Commit of the hub id, or a digest of the folder's weights."""
    num_latents: Annotated[int, Field(gt=0)]
    hidden_size: Annotated[int, Field(gt=0)]
    pooling: Literal["mean"] = "mean"
    norm: Literal["l2"] = "l2"
    prompt: str = ""
    max_text_tokens: int = 128
    temperature: float
    """Learned divisor of similarities."""
    max_pixels: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the backbone's weights that the fingerprint speaks of."""
    fingerprint: str = ""


def fingerprint(backbone: Backbone, latent_queries: LatentQueries | None) -> str:
    """sha256 that names an embedding space: backbone, processor, template, adapter tensors, pooling, dimension, dtype.

    Args:
        backbone: The frozen model.
        latent_queries: None for the zero-shot last token.
    """
    identity: dict[str, Any] = backbone.identity()
    identity["pooling"] = "mean" if latent_queries is not None else "last_token"
    identity["dimension"] = backbone.hidden_size
    identity["dtype"] = str(backbone.dtype)
    if latent_queries is not None:
        identity["latents_sha256"] = hashlib.sha256(_weights(latent_queries)).hexdigest()
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _weights(latent_queries: LatentQueries) -> bytes:
    tensors = {
        name: value.detach().float().cpu().contiguous()
        for name, value in latent_queries.named_parameters()
    }
    return save(tensors)


def save_adapter(
    folder: Path, backbone: Backbone, latent_queries: LatentQueries, *, card: str = ""
) -> Path:
    """Write an adapter folder; it appears complete or not at all.

    Args:
        folder: Replaced if it exists.
        backbone: What the adapter belongs to.
        latent_queries: The trained tensors.
        card: Extra text for the model card, such as results.

    Raises:
        StorageError: The folder cannot be written.
    """
    config = AdapterConfig(
        base_model_name_or_path=backbone.name,
        revision=backbone.revision,
        num_latents=latent_queries.num_latents,
        hidden_size=backbone.hidden_size,
        prompt=backbone.settings.prompt,
        max_text_tokens=backbone.settings.max_text_tokens,
        temperature=float(latent_queries.temperature.detach()),
        max_pixels=backbone.max_pixels,
        dtype=str(backbone.dtype).removeprefix("torch."),  # type: ignore[arg-type] # pydantic checks it
        fingerprint=fingerprint(backbone, latent_queries),
    )
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / ADAPTER_WEIGHTS).write_bytes(_weights(latent_queries))
        write_json(partial / ADAPTER_CONFIG, config.model_dump())
        (partial / "README.md").write_text(_model_card(config, latent_queries, card))
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


def load_latent_queries(folder: Path, backbone: Backbone) -> LatentQueries:
    """The trained tensors of an adapter, checked against the backbone they are used with.

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
    latent_queries = LatentQueries(config.num_latents, config.hidden_size)
    try:
        latent_queries.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    latent_queries.to(backbone.device)
    found = fingerprint(backbone, latent_queries)
    # A fingerprint names one weight type; the same adapter may be run in another one.
    if config.fingerprint and config.revision != backbone.revision:
        raise ArtifactMismatchError(
            f"adapter {folder} has fingerprint {config.fingerprint} on {config.base_model_name_or_path} at "
            f"{config.revision}; with backbone {backbone.name} at {backbone.revision} it would be {found}"
        )
    return latent_queries


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a part.

    Raises:
        StorageError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # writers may race
    try:
        with partial.open("w") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error}; free space or choose another folder"
        ) from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_card(config: AdapterConfig, latent_queries: LatentQueries, card: str) -> str:
    count = latent_queries.latents.numel()
    return f"""---
base_model: {config.base_model_name_or_path}
library_name: slq
tags: [retrieval, multimodal, latent-queries]
---
# Shared latent queries for {config.base_model_name_or_path}

{config.num_latents} latent queries of width {config.hidden_size} ({count:,} values) and one temperature
({config.temperature:.4f}). The backbone (revision `{config.revision}`) is frozen and unchanged.

```python
from slq import Encoder
encoder = Encoder.from_pretrained("PATH_TO_THIS_FOLDER")
vectors = encoder.encode(["a red apple"])   # (1, {config.hidden_size}) float32, unit norm
```

Fingerprint: `{config.fingerprint}` (torch {torch.__version__.split("+")[0]})

{card}"""
