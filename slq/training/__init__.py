"""SLQ training without any cluster: settings, the order of pairs, inputs computed once, and one step's loss.

`pipelines.train` drives these on Ray Train with DeepSpeed; a test drives them in one plain process. Names are imported
on first use: whoever reads the settings of a recipe needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slq.training.modules import MinedRows, RetrievalModule, deepspeed_config, finite
    from slq.training.reading import SIDES, PairReader, Side
    from slq.training.sampling import PairSampler, rank_slice
    from slq.training.settings import AdapterSettings, TrainConfig, learning_rate_scale
    from slq.training.sources import PrefixSource, PromptSource, substitute

__all__ = [
    "SIDES",
    "AdapterSettings",
    "MinedRows",
    "PairReader",
    "PairSampler",
    "PrefixSource",
    "PromptSource",
    "RetrievalModule",
    "Side",
    "TrainConfig",
    "deepspeed_config",
    "finite",
    "learning_rate_scale",
    "rank_slice",
    "substitute",
]
_HOME = {
    "modules": ("MinedRows", "RetrievalModule", "deepspeed_config", "finite"),
    "reading": ("SIDES", "PairReader", "Side"),
    "sampling": ("PairSampler", "rank_slice"),
    "settings": ("AdapterSettings", "TrainConfig", "learning_rate_scale"),
    "sources": ("PrefixSource", "PromptSource", "substitute"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOME.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'slq.training' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"slq.training.{home}"), name)
