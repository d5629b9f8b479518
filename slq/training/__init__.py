"""SLQ training without any cluster: settings, the order of pairs, inputs computed once, and one step's loss.

`pipelines.train` drives these on Ray Train with DeepSpeed; a test drives them in one plain process.
"""

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
