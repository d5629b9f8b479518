"""The adapters of a service: one frozen model embeds for all of them, and they come and go while it answers.

Which there are stands in the recipe and, for what changed since, in the record that all replicas of the service read.
An adapter is some 40 KB, so each replica holds all of them that were asked for.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.serving.course import Course, Record
from slq.artifacts import load_adapter, load_adapter_config, require_same_fingerprint
from slq.encoder import Encoder
from slq.errors import ArtifactError, ArtifactMismatchError, DataError, UnknownModelError
from slq.latent_queries import LatentQueries

log = logging.getLogger(__name__)
OWN = "slq"
"""The name of the adapter that a service was started with."""
_AGAIN_S = 10.0  # after an adapter could not be loaded


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an adapter made of items.

    Attributes:
        vectors: (dimension,) float32 of unit norm, in the order of the items.
        fingerprint: Of their embedding space.
    """

    vectors: list[NDArray[np.float32]]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapter lies, and what was found there when it was added."""

    folder: str
    fingerprint: str


class Adapters:
    """Encoders by the names of their adapters, on one frozen backbone.

    Args:
        own: The encoder that the service was started with.
        given: Further adapters of the recipe: name -> folder, and the fingerprint that was there at the start.
        root: The folder below which adapters may be added later.
        record: What changed since the start.
    """

    def __init__(
        self,
        own: Encoder,
        given: Mapping[str, tuple[str, str]],
        root: Path,
        record: Record,
    ) -> None:
        self._own = own
        self._given = {name: _Place(*one) for name, one in given.items()}
        self._root = root.resolve()
        self._record = record
        self._loaded: dict[str, tuple[_Place, Encoder]] = {}
        self._failed: dict[_Place, tuple[Exception, float]] = {}
        self._lock = threading.RLock()
        for name, place in self._places().items():
            if name in self._given:  # what the recipe names must be there
                self._bring(name, place)
        self.models()

    def is_own(self, model: str) -> bool:
        """Whether a model is the own adapter, which is at hand at once."""
        return model in (OWN, self._own.fingerprint)

    def _places(self) -> dict[str, _Place]:
        changes = self._record.read().adapters
        kept = {name: place for name, place in self._given.items() if name not in changes}
        return kept | {name: _Place(*one) for name, one in changes.items() if one is not None}

    def encoder(self, model: str) -> Encoder:
        """The encoder of a model.

        Args:
            model: The name of an adapter, or the fingerprint of its embedding space.

        Raises:
            UnknownModelError: There is none.
            ArtifactError: Its folder is gone or damaged.
            ArtifactMismatchError: Its folder holds an adapter of another model by now.
        """
        if self.is_own(model):
            return self._own
        with self._lock:
            places = self._places()
            self._loaded = {name: one for name, one in self._loaded.items() if name in places}
            if model in places:
                return self._bring(model, places[model])
            for name, fingerprint in self.models().items():
                if fingerprint == model:
                    return self._loaded[name][1]
        raise UnknownModelError(
            f"there is no model {model!r}; this service has {', '.join([OWN, *sorted(places)])}"
        )

    def _bring(self, name: str, place: _Place) -> Encoder:
        held, encoder = self._loaded.get(name, (None, None))
        if encoder is None or held != place:
            encoder = self._loaded_again(place)
            self._loaded[name] = place, encoder
            log.info("adapter %r of %s is served", name, place.folder)
        return encoder

    def _loaded_again(self, place: _Place) -> Encoder:
        """What lies at a place; what failed there is not tried again at once, and is logged once."""
        error, at = self._failed.get(place, (None, -math.inf))
        if error is not None and time.monotonic() - at < _AGAIN_S:
            raise error
        try:
            encoder = self._load(Path(place.folder))
            if place.fingerprint != encoder.fingerprint:
                raise ArtifactMismatchError(
                    f"adapter {place.folder} was added with fingerprint {place.fingerprint} and has "
                    f"{encoder.fingerprint} by now; add it again"
                )
        except (ArtifactError, DataError) as failure:
            if error is None:
                log.warning("an adapter cannot be served: %s", failure)
            self._failed[place] = failure, time.monotonic()
            raise
        self._failed.pop(place, None)
        return encoder

    def _load(self, folder: Path) -> Encoder:
        config, backbone = load_adapter_config(folder), self._own.backbone
        if config.slq_type != "SLQ" or not isinstance(self._own.adapter, LatentQueries):
            raise DataError(
                f"adapter {folder} cannot be added: only latent queries share a model, and a service of LoRA or of a "
                "fine-tuned model has that one alone"
            )
        encoder = Encoder(backbone, load_adapter(folder, backbone))
        require_same_fingerprint(
            config.fingerprint,
            encoder.fingerprint,
            expected_in=f"adapter {folder}",
            found_in="the model of this service with it",
            remedy="its prompt or its settings differ from those of the service's own adapter",
        )
        return encoder

    def models(self) -> dict[str, str]:
        """Fingerprints by name; those that cannot be loaded are missing."""
        found = {OWN: self._own.fingerprint}
        with self._lock:
            for name, place in self._places().items():
                try:
                    found[name] = self._bring(name, place).fingerprint
                except (ArtifactError, DataError):
                    continue  # it was logged
        return found

    def add(self, name: str, folder: str, needed: str) -> str:
        """Serve a further adapter, or another one under a name; gives its fingerprint.

        Args:
            name: What requests call it.
            folder: Relative to the root.
            needed: Fingerprint of the embedding space that is searched, whose adapter stays.

        Raises:
            DataError: The name is that of the own adapter or of the one that is needed, or the folder lies elsewhere or
                holds no adapter.
            ArtifactMismatchError: It belongs to another model.
        """
        self._require_other(name)
        encoder = self._new(folder)
        if encoder.fingerprint != needed:
            self._require_not_needed(name, needed)
        path = str((self._root / folder).resolve())
        self._change(name, (path, encoder.fingerprint))
        with self._lock:
            self._loaded[name] = _Place(path, encoder.fingerprint), encoder
        return encoder.fingerprint

    def _new(self, folder: str) -> Encoder:
        """The encoder of a folder that a request names."""
        try:
            path = (self._root / folder).resolve()
            is_there = path.is_dir()
        except (OSError, ValueError):
            raise DataError(f"folder {folder[:100]!r} is no name of a folder") from None
        if not path.is_relative_to(self._root):
            raise DataError(f"folder {folder!r} does not lie below the service's adapters_dir")
        if not is_there:
            raise DataError(f"there is no folder {folder!r} in the service's adapters_dir")
        try:
            return self._load(path)
        except ArtifactMismatchError:
            raise
        except ArtifactError as error:
            raise DataError(str(error)) from None

    def remove(self, name: str, needed: str) -> None:
        """Serve an adapter no longer.

        Args:
            name: Of the adapter.
            needed: Fingerprint of the embedding space that is searched, whose adapter stays.

        Raises:
            DataError: It is the own one, or the one that is needed.
            UnknownModelError: There is none of this name.
        """
        self._require_other(name)
        if name not in self._places():
            raise UnknownModelError(f"there is no model {name!r} to remove")
        self._require_not_needed(name, needed)
        self._change(name, None)
        with self._lock:
            self._loaded.pop(name, None)

    def _change(self, name: str, value: tuple[str, str] | None) -> None:
        def changed(course: Course) -> Course:
            return replace(course, adapters={**course.adapters, name: value})

        self._record.change(changed)

    def _require_not_needed(self, name: str, needed: str) -> None:
        """An adapter by which the index is searched stays, unless it goes by another name, too."""
        models = self.models()
        if [one for one, fingerprint in models.items() if fingerprint == needed] == [name]:
            raise DataError(
                f"the index version that answers was built with adapter {name!r}; it stays"
            )

    def _require_other(self, name: str) -> None:
        if name == OWN:
            raise DataError(
                f"{OWN!r} is the adapter that the service was started with; give another name"
            )
