"""Before the flow: ranges of int8 and binary vectors, measured once on items from all over the corpus."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.embedding.encode import EncodePieces
from pipelines.embedding.flow import Flow
from pipelines.embedding.prepare import prepared_pieces
from pipelines.failures import failure_text
from slq.errors import DataError, SlqError
from slq.quantization import calibrate, cut

CALIBRATION = "calibration.json"
_SHARDS = 16


def sample_shards(num_shards: int) -> list[int]:
    """Up to 16 shards, evenly spread."""
    return sorted({int(n) for n in np.linspace(0, num_shards - 1, min(_SHARDS, num_shards))})


def measured_ranges(flow: Flow, shard_ids: list[int]) -> dict[str, Any] | str:
    """Calibration from the first rows of some shards, as JSON; or as text the error that prevents it."""
    rows_each = -(-flow.recipe.embed.calibration_rows // len(shard_ids))
    try:
        vectors = list(_vectors(flow, shard_ids, rows_each))
        if not vectors:
            raise DataError("ranges cannot be measured: no item of the sample can be embedded")
        return calibrate(np.concatenate(vectors)).to_json()
    except SlqError as error:
        return failure_text(error)


def _vectors(flow: Flow, shard_ids: list[int], rows_each: int) -> Iterator[NDArray[np.float32]]:
    encoder = EncodePieces(flow)
    for shard_id in shard_ids:
        for piece in prepared_pieces(flow, shard_id, list(range(rows_each))):
            found = encoder.encoded(piece)
            if found.vectors is not None:
                yield cut(found.vectors[0], flow.dimension)
