"""slq: turns a frozen multimodal LLM into a retriever, and serves it.

`Encoder` embeds, `Reranker` scores pairs; both are imported on first use, so `import slq` is instant.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "Item", "LatentQueries", "Reranker", "load_backbone"]

if TYPE_CHECKING:
    from slq.backbones import load_backbone
    from slq.encoder import Encoder
    from slq.latent_queries import LatentQueries
    from slq.reranker import Reranker
    from slq.schema import Item

_HOME = {
    "Encoder": "slq.encoder",
    "Item": "slq.schema",
    "LatentQueries": "slq.latent_queries",
    "Reranker": "slq.reranker",
    "load_backbone": "slq.backbones",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slq' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
