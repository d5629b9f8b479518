"""Inputs of a step: prefixes that are computed once and kept, or prompts where the whole model is trained."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import arange, from_numpy

from slq.backbones import Backbone
from slq.backbones.base import Prompts
from slq.backbones.vision import VisionStore
from slq.errors import TrainingError
from slq.media import pixels_sha256
from slq.prefix import Prefix, PrefixCache
from slq.prefix_store import PrefixStore
from slq.schema import Item
from slq.training.reading import SIDES, Ahead, Loaded, PairReader, Side


class PrefixSource:
    """Prefixes of training pairs, computed once and kept.

    Args:
        backbone: The frozen model.
        reader: The pairs.
        cache_bytes: Bound of the queries' prefixes in host memory.
        text_cache_bytes: Bound of the positives' prefixes; as `cache_bytes` by default.
        store: Queries' prefixes on disk, which outlive the run; none by default.
        vision_store: Vision features of all images on disk, which spare the vision tower where a prefix has to be
            computed; none by default.
        frozen_rows: Rows per frozen forward pass.
        chunk_rows: Rows of a chunk that is handed out; 0 hands out all rows as one.
    """

    def __init__(
        self,
        backbone: Backbone,
        reader: PairReader,
        *,
        cache_bytes: int,
        text_cache_bytes: int | None = None,
        store: PrefixStore | None = None,
        vision_store: VisionStore | None = None,
        frozen_rows: int = 32,
        chunk_rows: int = 0,
    ) -> None:
        self._backbone = backbone
        self._reader = reader
        self._keys = reader.query_keys
        self._ahead = Ahead(self._load)
        self._frozen_rows = frozen_rows
        self._chunk_rows = chunk_rows
        self._store = store
        self._vision_store = vision_store
        self._query_bytes = self._num_queries = 0
        self.cache = PrefixCache(cache_bytes, backbone.device)
        self.text_cache = PrefixCache(
            cache_bytes if text_cache_bytes is None else text_cache_bytes, backbone.device
        )

    @property
    def cached_share(self) -> float:
        """Share of the queries' prefixes so far that were not computed."""
        found = self.cache.hits + (self._store.hits if self._store else 0)
        return found / max(1, self.cache.hits + self.cache.misses)

    @property
    def bytes_per_query(self) -> float:
        """Mean size of a query's keys and values so far; 0 before the first."""
        return self._query_bytes / max(1, self._num_queries)

    def begin(self, pairs: Sequence[int], others: Sequence[int] = ()) -> None:
        """Start to read and decode what pairs will need, in threads; of `others` only the queries."""
        queries: list[tuple[int, Side]] = [
            (pair, "query") for pair in (*pairs, *others) if self._keys[pair] not in self.cache
        ]
        self._ahead.begin(
            [*queries, *((pair, "positive") for pair in pairs if pair not in self.text_cache)]
        )

    def read(self, pairs: Sequence[int], others: Sequence[int] = ()) -> None:
        """Read and decode what pairs need, before any pass of the model; of `others` only the queries.

        Raises:
            UnusablePairError: A pair cannot be used; `pair` is its number.
        """
        self.begin(pairs, others)
        self._ahead.wait()

    def queries(self, pairs: Sequence[int]) -> list[Prefix]:
        """Prefixes of pairs' queries, in chunks; captions of one image share one entry."""
        keys = [self._keys[pair] for pair in pairs]
        prefix = self.cache.get(keys, lambda rows: self._stored([pairs[r] for r in rows]))
        self._query_bytes += prefix.num_bytes
        self._num_queries += len(prefix)
        return self._chunks(prefix)

    def positives(self, pairs: Sequence[int]) -> list[Prefix]:
        """Prefixes of pairs' positives, in the chunks of `queries`."""
        return self._chunks(
            self.text_cache.get(
                list(pairs),
                lambda rows: self._encode([self._loaded(pairs[r], "positive") for r in rows]),
            )
        )

    def _chunks(self, prefix: Prefix) -> list[Prefix]:
        size = self._chunk_rows or len(prefix)
        if size >= len(prefix):
            return [prefix]
        return [
            prefix.select(arange(start, min(start + size, len(prefix)), device=prefix.mask.device))
            for start in range(0, len(prefix), size)
        ]

    def _load(self, pair: int, side: Side) -> Loaded:
        """Reads and decodes, from several threads."""
        if side == "positive" or self._store is None:
            return self._decoded(pair, side)
        digest = self._reader.digest(pair)
        if digest in self._store:
            return Loaded(None, digest)
        return replace(self._decoded(pair, side), digest=digest)

    def _decoded(self, pair: int, side: Side) -> Loaded:
        item = self._reader.item(pair, side)
        if self._vision_store is None or item.image is None:
            return Loaded(item)
        pixels = pixels_sha256(item.image)
        return Loaded(item, pixels=pixels, features=self._vision_store.get(pixels))

    def _loaded(self, pair: int, side: Side) -> Loaded:
        loaded = self._ahead.take(pair, side)
        return loaded if loaded.item is not None else self._decoded(pair, side)

    def _stored(self, pairs: list[int]) -> Prefix:
        """Queries' prefixes from the store, and into it those that it lacks."""
        if self._store is None:
            return self._encode([self._loaded(pair, "query") for pair in pairs])
        digests = [self._ahead.take(pair, "query").digest for pair in pairs]
        rows = {n: row for n, d in enumerate(digests) if (row := self._store.get(d)) is not None}
        missing = [n for n in range(len(pairs)) if n not in rows]
        if missing:
            computed = self._encode([self._loaded(pairs[n], "query") for n in missing])
            for n, row in zip(missing, computed.to("cpu").split(), strict=True):
                self._store.put(digests[n], row)
                rows[n] = row
        return Prefix.stack([rows[n] for n in range(len(pairs))])

    def _encode(self, loaded: list[Loaded]) -> Prefix:
        """Passes over items of similar length, so little is padded; the result is in input order."""
        loaded = [self._with_features(one) for one in loaded]
        order = sorted(range(len(loaded)), key=lambda n: loaded[n].text_length)
        # no pass mixes images whose features are stored with those that need the vision tower
        groups = [
            [n for n in order if (loaded[n].features is None) is new] for new in (True, False)
        ]
        chunks = [
            group[start : start + self._frozen_rows]
            for group in groups
            for start in range(0, len(group), self._frozen_rows)
        ]
        stacked = Prefix.stack([self._pass([loaded[n] for n in chunk]) for chunk in chunks])
        places = np.argsort(np.concatenate(chunks))
        return stacked.select(from_numpy(places).to(stacked.mask.device))

    def _with_features(self, loaded: Loaded) -> Loaded:
        """Look again: they may have been stored since the item was read."""
        if self._vision_store is None or not loaded.pixels or loaded.features is not None:
            return loaded
        return replace(loaded, features=self._vision_store.get(loaded.pixels))

    def _pass(self, loaded: list[Loaded]) -> Prefix:
        """A frozen pass; the vision tower runs unless features were loaded, and what it gives is stored."""
        backbone = self._backbone
        prompts = backbone.prompts([one.item for one in loaded if one.item is not None])
        if self._vision_store is None:
            return backbone.prefix(prompts)
        features = [one.features for one in loaded if one.features is not None]
        if not features:
            features = backbone.vision_features(prompts)
            shown = [one.pixels for one in loaded if one.pixels]
            for pixels, image in zip(shown, features, strict=True):
                self._vision_store.put(pixels, image.to("cpu"))
        return backbone.prefix(prompts, [image.to(backbone.device) for image in features])


class PromptSource:
    """Prompts of training pairs, for methods that train the model itself; nothing of them can be kept.

    Args:
        backbone: The model.
        reader: The pairs.
        chunk_rows: Rows of a chunk; 0 hands out all rows as one.
    """

    cached_share = 0.0

    def __init__(self, backbone: Backbone, reader: PairReader, *, chunk_rows: int = 0) -> None:
        self._backbone = backbone
        self._ahead = Ahead(lambda pair, side: Loaded(reader.item(pair, side)))
        self._chunk_rows = chunk_rows

    def begin(self, pairs: Sequence[int], others: Sequence[int] = ()) -> None:
        """Start to read and decode pairs, in threads; of `others` only the queries."""
        both: list[tuple[int, Side]] = [(pair, side) for pair in pairs for side in SIDES]
        self._ahead.begin([*both, *((pair, "query") for pair in others)])

    def read(self, pairs: Sequence[int], others: Sequence[int] = ()) -> None:
        """Read and decode pairs, before any pass of the model; of `others` only the queries.

        Raises:
            UnusablePairError: A pair cannot be used; `pair` is its number.
        """
        self.begin(pairs, others)
        self._ahead.wait()

    def queries(self, pairs: Sequence[int]) -> list[Prompts]:
        """Prompts of pairs' queries, in chunks."""
        return self._prompts([self._ahead.take(pair, "query").item for pair in pairs])

    def positives(self, pairs: Sequence[int]) -> list[Prompts]:
        """Prompts of pairs' positives, in the chunks of `queries`."""
        return self._prompts([self._ahead.take(pair, "positive").item for pair in pairs])

    def _prompts(self, loaded: Sequence[Item | None]) -> list[Prompts]:
        items = [item for item in loaded if item is not None]  # only stored prefixes have none
        size = self._chunk_rows or len(items)
        return [
            self._backbone.prompts(items[start : start + size])
            for start in range(0, len(items), size)
        ]


def substitute(
    batch: NDArray[np.int64],
    image_keys: Sequence[str],
    bad: set[int],
    *,
    seed: int,
) -> NDArray[np.int64]:
    """The batch with unusable pairs replaced, so that it keeps its size; every worker that knows `bad` agrees.

    Args:
        batch: (global_batch,) int64 pairs of distinct images.
        image_keys: The image of each pair.
        bad: Pairs that cannot be used.
        seed: Of the draw.

    Returns:
        (global_batch,) int64; good pairs keep their places, and images stay distinct.

    Raises:
        TrainingError: There are too few usable images.
    """
    if not bad.intersection(batch.tolist()):
        return batch
    replaced = batch.copy()
    used = {image_keys[pair] for pair in batch.tolist() if pair not in bad}
    spares = iter(np.random.default_rng([seed, *batch.tolist()]).permutation(len(image_keys)))
    for place, pair in enumerate(batch.tolist()):
        if pair not in bad:
            continue
        for spare in map(int, spares):
            if spare not in bad and image_keys[spare] not in used:
                replaced[place] = spare
                used.add(image_keys[spare])
                break
        else:
            raise TrainingError(
                "too many training images cannot be read: none is left to take a broken one's place"
            )
    return replaced
