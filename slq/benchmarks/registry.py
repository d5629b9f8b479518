"""Every benchmark that `data.benchmark` can name, by its `format`."""

from typing import Annotated

from pydantic import Field

from slq.benchmarks.cirr import CirrConfig
from slq.benchmarks.fashion_iq import FashionIqConfig
from slq.benchmarks.karr_pairs import KarrConfig
from slq.benchmarks.long_captions import ShareGpt4vConfig, Urban1kConfig
from slq.benchmarks.mbeir import MbeirConfig
from slq.benchmarks.mmeb_eval import MmebEvalConfig
from slq.benchmarks.sugar_crepe import SugarCrepeConfig

AnyBenchmark = Annotated[
    CirrConfig
    | FashionIqConfig
    | KarrConfig
    | MbeirConfig
    | MmebEvalConfig
    | ShareGpt4vConfig
    | SugarCrepeConfig
    | Urban1kConfig,
    Field(discriminator="format"),
]
"""A config of one of them; a new benchmark is one more line."""
