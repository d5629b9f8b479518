"""How an index is built and searched."""

from typing import Annotated, Literal

from pydantic import Field

from slq.config import Section
from slq.errors import ConfigError

Codes = Literal["float32", "float16", "int8", "int4", "rabitq", "pq4"]
BITS: dict[str, float] = {
    "float32": 32,
    "float16": 16,
    "int8": 8,
    "int4": 4,
    "rabitq": 1,
    "pq4": 0.5,
}
"""Bits that a value of a vector takes in the lists, about; `pq4` spends four on eight values."""
_EXACT_ENOUGH_BITS = 16


class IndexConfig(Section):
    """How the index is built and searched."""

    kind: Literal["flat", "ivf"] = "flat"
    """`flat` compares with every vector (exact); `ivf` visits the nearest lists only."""
    num_lists: Annotated[int, Field(gt=0)] = 64
    """Inverted lists of `ivf`."""
    num_probes: Annotated[int, Field(gt=0)] = 16
    """Lists visited per query by `ivf`."""
    quantizer: Literal["flat", "hnsw"] = "flat"
    """How `ivf` finds the nearest lists: by comparing with all, or in a graph, which pays from some 10,000 lists on."""
    codes: Codes = "float32"
    """What `ivf` keeps of a vector in its lists. `rabitq` takes a bit a value, `pq4` half a bit."""
    rotation: Literal["none", "random", "opq"] = "none"
    """Of the vectors before they are coded: `random` spreads what few values hold, `opq` is trained."""
    oversample: Annotated[float, Field(ge=1)] = 4.0
    """Candidates per result that are scored again from the float16 vectors, where codes have less than sixteen bits."""
    seed: int = 0

    @property
    def is_rescored(self) -> bool:
        """Whether scores of the codes are too coarse to rank by."""
        return self.kind == "ivf" and BITS[self.codes] < _EXACT_ENOUGH_BITS

    def require_room(self, count: int) -> None:
        """Check the settings against the number of vectors.

        Raises:
            ConfigError: `ivf` has more lists than vectors.
        """
        if self.kind == "ivf" and self.num_lists > count:
            raise ConfigError(
                f"index.num_lists is {self.num_lists}, but there are only {count} vectors; lower it or set "
                "index.kind=flat"
            )
