"""First stage: the pairs of a shard with the encoded images that they show, each once."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.embedding.pieces import table_from_bytes, table_to_bytes
from pipelines.failures import FAILURE, failure_text
from pipelines.fetching import fetch_images
from pipelines.reranking.flow import Flow
from pipelines.reranking.plan import read_pairs
from slq.errors import DataError, SlqError

_BLOCK = pa.schema(
    [
        ("shard_id", pa.int64()),
        ("pairs", pa.large_binary()),
        ("uris", pa.list_(pa.string())),
        ("images", pa.list_(pa.large_binary())),
        ("problems", pa.list_(pa.string())),
        (FAILURE, pa.string()),
    ]
)


@dataclass(frozen=True)
class Gathered:
    """A shard before it is scored.

    Attributes:
        pairs: As `pipelines.reranking.plan.PAIRS`.
        images: Encoded images by uri.
        problems: Why an image could not be had, by uri.
    """

    shard_id: int
    pairs: pa.Table
    images: dict[str, bytes]
    problems: dict[str, str]

    def to_block(self) -> pa.Table:
        """The shard as a table of one row."""
        uris = [*self.images, *self.problems]
        values = {
            "shard_id": self.shard_id,
            "pairs": table_to_bytes(self.pairs),
            "uris": uris,
            "images": [self.images.get(uri) for uri in uris],
            "problems": [self.problems.get(uri) for uri in uris],
            FAILURE: None,
        }
        return pa.table(
            {name: pa.array([value], _BLOCK.field(name).type) for name, value in values.items()},
            schema=_BLOCK,
        )

    @classmethod
    def from_block(cls, block: pa.Table) -> "Gathered":
        """What `to_block` gave."""
        (row,) = block.to_pylist()
        found = list(zip(row["uris"], row["images"], row["problems"], strict=True))
        return cls(
            shard_id=row["shard_id"],
            pairs=table_from_bytes(row["pairs"]),
            images={uri: image for uri, image, problem in found if problem is None},
            problems={uri: problem for uri, _, problem in found if problem is not None},
        )


def gather(block: pa.Table, flow: Flow) -> pa.Table:
    """Read a shard's pairs and their images.

    Args:
        block: One row with `shard_id`.
        flow: What the run knows.

    Returns:
        One row: a `Gathered`, or the error that ends the run.
    """
    try:
        return gathered(flow, block["shard_id"][0].as_py()).to_block()
    except SlqError as error:
        values = {**dict.fromkeys(_BLOCK.names), FAILURE: failure_text(error)}
        return pa.Table.from_pylist([values], schema=_BLOCK)


def gathered(flow: Flow, shard_id: int) -> Gathered:
    """The shard.

    Raises:
        ArtifactError: The plan is damaged.
        StorageError: A store cannot be read.
    """
    pairs = read_pairs(flow.ledger().store, shard_id)
    usable = pairs.filter(pc.is_null(pairs["problem"]))
    uris = pa.chunked_array([*usable["query_uri"].chunks, *usable["item_uri"].chunks], pa.string())
    wanted = pc.unique(uris.drop_null()).to_pylist()
    found = fetch_images(wanted, flow.recipe.storage.retry_s)
    return Gathered(
        shard_id,
        pairs,
        images={uri: image for uri, image in found.items() if isinstance(image, bytes)},
        problems={
            uri: str(image) if isinstance(image, DataError) else "there is no image in its place"
            for uri, image in found.items()
            if not isinstance(image, bytes)
        },
    )
