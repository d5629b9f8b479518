"""Stored vectors held against those of their own inputs, embedded anew by the adapter that made them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import Commit
from pipelines.corpus import Record, fetch_image
from pipelines.embedding.batches import batches_by_tokens
from pipelines.embedding.canary import CANARY
from pipelines.embedding.prepare import content_hash, prepared_row
from pipelines.storage import Store
from pipelines.verification.findings import Finding, first_few
from pipelines.verification.items import StoredItem, stored_item
from slq.artifacts import load_adapter_config
from slq.backbones.prompting import Prompt
from slq.encoder import Encoder
from slq.errors import ArtifactMismatchError, DataError, StorageError
from slq.quantization import Vectors, cut

Input = tuple[StoredItem, Record]
TOLERANCE = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest length of the difference of two unit vectors, by the type of the weights. Rounding to float16 alone makes up
to 5e-4; another device or other company in a batch changes the rest."""
_BATCH_SIZE, _BATCH_TOKENS = 32, 8192


@dataclass(slots=True)
class Anew:
    """What embedding anew gave.

    Attributes:
        count: Vectors that were made.
        largest_difference: Between a stored vector and the new one; None without any.
        findings: Items that are not what they were, or were never what they should be.
        notes: What could not be done.
    """

    count: int = 0
    largest_difference: float | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, items: Sequence[StoredItem], number: int, what: str) -> None:
        """Note what is wrong with these of a number of items, if there are any."""
        if items:
            named = first_few([f"{item.id!r} ({item.place})" for item in items])
            message = f"{len(items)} of {number} {what}: {named}"
            self.findings.append(Finding("embedding", items[0].file, message))


def spread(commits: Mapping[int, Commit], count: int) -> dict[int, list[int]]:
    """Up to `count` rows with vectors, evenly spread over a data set: shard id -> positions in its file."""
    shards = sorted(commits)
    ends = np.cumsum([commits[shard_id].rows for shard_id in shards])
    total = int(ends[-1]) if shards else 0
    count = min(count, total)
    chosen: dict[int, list[int]] = {}
    for row in ((np.arange(count) + 0.5) * total / max(1, count)).astype(np.int64):
        place = int(np.searchsorted(ends, row, side="right"))
        start = int(ends[place]) - commits[shards[place]].rows
        chosen.setdefault(shards[place], []).append(int(row) - start)
    return chosen


def adapters_by_column(
    manifest: Mapping[str, Any], folders: Sequence[Path]
) -> tuple[dict[str, Path], list[str]]:
    """Which adapter made which column; told by fingerprints.

    Args:
        manifest: Of the data set.
        folders: As the user gave them; without any that of the manifest, if it is still there.

    Returns:
        Column -> folder, and notes about what cannot be embedded anew.

    Raises:
        ArtifactError: A folder holds no adapter.
        ArtifactMismatchError: None of the data set's columns was made by one of the adapters.
    """
    further = {f"embedding_{name}": one for name, one in manifest.get("adapters", {}).items()}
    columns = {"embedding": manifest["fingerprint"], **further}
    own = Path(manifest.get("adapter", ""))
    if not folders:
        if not (own / "adapter_config.json").is_file():
            return {}, [
                f"there is no adapter at {own}, so nothing was embedded anew; give --adapter"
            ]
        folders = [own]
    found: dict[str, Path] = {}
    for folder in folders:
        fingerprint = load_adapter_config(folder).fingerprint
        mine = [name for name, wanted in columns.items() if wanted == fingerprint]
        if not mine:
            raise ArtifactMismatchError(
                f"adapter {folder} has fingerprint {fingerprint}, but the data set was made with "
                f"{first_few(list(columns.values()))}; give the right one with --adapter, or --sample 0"
            )
        found |= dict.fromkeys(mine, folder)
    left = [name for name in columns if name not in found]
    notes = [f"{first_few(left)} not embedded anew; give --adapter for each"] if left else []
    return found, notes


def read_canary(store: Store) -> tuple[list[StoredItem], list[Finding]]:
    """The items that are stored with their inputs; a file that cannot be read is a finding, a missing one is not.

    Raises:
        StorageError: The store cannot be read.
    """
    try:
        with store.open(CANARY) as file:
            table = pq.read_table(file)
        items = []
        for row in range(table.num_rows):
            one = table.slice(row, 1)
            item = stored_item(one, CANARY, row)
            item.image, item.is_canary = one["image"][0].as_py(), True
            items.append(item)
    except FileNotFoundError:
        return [], []
    except (OSError, KeyError, AttributeError, pa.ArrowException) as error:
        return [], [Finding("files", CANARY, f"it cannot be read: {error}")]
    return items, []


def embed_anew(
    items: Sequence[StoredItem], folders: Mapping[str, Path], dimension: int, device: str
) -> Anew:
    """Embed items again and compare; a task for one worker.

    Args:
        items: Of the data set.
        folders: Column -> adapter that made it.
        dimension: Length of the stored vectors.
        device: `cpu` or `cuda[:n]`.

    Raises:
        SlqError: An adapter, or its backbone, cannot be loaded.
    """
    found = Anew()
    inputs = _inputs(items, found)
    for column, folder in folders.items():
        mine = [(item, record) for item, record in inputs if column in item.vectors]
        if mine:
            encoder = Encoder.from_pretrained(folder, device=device)
            _compare(encoder, column, mine, dimension, found)
    return found


def _inputs(items: Sequence[StoredItem], found: Anew) -> list[Input]:
    """What was embedded, as far as it can be read and is still the same."""
    inputs, changed, gone = [], [], []
    for item in items:
        try:
            record = Record(item.id, item.uri or "", _image(item), item.text, {})
        except (DataError, StorageError) as error:
            gone.append(f"{item.id!r} ({error})")
            continue
        if content_hash(record) == item.content_hash:
            inputs.append((item, record))
        else:
            changed.append(item)
    told = {
        True: "are not what their content_hash says",
        False: "are others now: the corpus changed",
    }
    for is_canary, what in told.items():
        some = [item for item in changed if item.is_canary == is_canary]
        found.tell(some, len(items), f"inputs {what}")
    if gone:
        found.notes.append(
            f"{len(gone)} of {len(items)} inputs cannot be read any more: {first_few(gone)}"
        )
    return inputs


def _image(item: StoredItem) -> bytes | None:
    if item.is_canary or item.modality == "text" or item.uri is None:
        return item.image
    return fetch_image(item.uri)


def _compare(
    encoder: Encoder, column: str, inputs: Sequence[Input], dimension: int, found: Anew
) -> None:
    good, prompts, refused = [], [], []
    for item, record in inputs:
        _, prompt = prepared_row(encoder.backbone, record)
        if prompt is None:
            refused.append(item)
        else:
            good.append(item)
            prompts.append(prompt)
    found.tell(refused, len(inputs), "stored items would be quarantined now")
    if not good:
        return
    stored = np.stack([item.vectors[column] for item in good]).astype(np.float32)
    apart = np.linalg.norm(cut(encoded(encoder, prompts), dimension) - stored, axis=1)
    found.count += len(good)
    found.largest_difference = max(float(apart.max()), found.largest_difference or 0.0)
    tolerance = TOLERANCE[str(encoder.backbone.dtype).removeprefix("torch.")]
    far = np.flatnonzero(~(apart <= tolerance))  # NaN compares as false
    if len(far):
        what = f"vectors of {column} are up to {apart[far].max():.4f} from those embedded anew, {tolerance} is allowed"
        found.tell([good[int(n)] for n in far], len(good), what)


def encoded(encoder: Encoder, prompts: Sequence[Prompt]) -> Vectors:
    """(prompts, hidden) vectors, encoded in batches of similar length."""
    batches = batches_by_tokens(
        [len(prompt) for prompt in prompts],
        [bool(prompt.vision) for prompt in prompts],
        batch_size=_BATCH_SIZE,
        batch_tokens=_BATCH_TOKENS,
    )
    vectors: Vectors = np.empty((len(prompts), encoder.dimension), dtype=np.float32)
    for batch in batches:
        collated = encoder.backbone.collate([prompts[n] for n in batch])
        vectors[batch] = encoder.encode_prompts(collated).float().cpu().numpy()
    return vectors
