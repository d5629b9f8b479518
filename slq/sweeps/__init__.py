"""What a search costs and finds when vectors are cut, stored more coarsely, indexed and re-ranked to some depth."""

from slq.sweeps.config import Cell, SweepConfig, cells_of, require_buildable
from slq.sweeps.pareto import front
from slq.sweeps.quality import Found, quality_of, ranked_again
from slq.sweeps.searching import CellIndex

__all__ = [
    "Cell",
    "CellIndex",
    "Found",
    "SweepConfig",
    "cells_of",
    "front",
    "quality_of",
    "ranked_again",
    "require_buildable",
]
