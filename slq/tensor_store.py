"""Tensors on disk that are cheaper to read than to compute: content-addressed, bounded in bytes, checked when read.

A store belongs to one kind of value and to what the values depend on. A file is named by its key and the sha256 of its
content, so a damaged one is found and computed again, and files appear whole or not at all.
"""

import hashlib
import json
import logging
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from safetensors.torch import load, save
from torch import Tensor

from slq.errors import ArtifactError, ArtifactMismatchError

log = logging.getLogger(__name__)
_INFO = "store.json"
_SUFFIX = ".safetensors"
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    sha256: str
    num_bytes: int


class TensorStore(ABC, Generic[Value]):
    """Values by key, each a few tensors.

    Several processes may share a folder; each bounds what it uses, and finds what the others wrote before it opened the
    store. What nobody seems to use goes first, once the folder is larger than all of them together may make it. A store
    that cannot be written to any more is read on. Several threads may read while one writes.

    Args:
        folder: Made if it is missing.
        fingerprint: What the values depend on besides their key.
        max_bytes: File bytes that this process keeps; the least recently used files go first.
        shared_by: Processes that use the folder together.

    Attributes:
        hits: Values that were found.
        damaged: Files that did not match their name.

    Raises:
        ArtifactMismatchError: The folder holds values of another fingerprint; both are named.
        ArtifactError: The folder holds something else, or cannot be made.
    """

    holds: ClassVar[str]  # of the values, in the plural
    setting: ClassVar[str]  # the recipe key of the folder

    def __init__(
        self, folder: Path, fingerprint: str, max_bytes: int, *, shared_by: int = 1
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._shared_by = shared_by
        self._full = False
        self._lock = threading.Lock()  # of all that follows, and never held while a value is read
        self.hits = 0
        self.damaged = 0
        self._require_own(fingerprint)
        self._found: OrderedDict[str, _Entry] = OrderedDict()  # another process may be using these
        self._used: OrderedDict[str, _Entry] = OrderedDict()
        self._found_bytes = self._used_bytes = 0
        for _, size, path in sorted(_files(folder)):
            key, _, sha256 = path.name.removesuffix(_SUFFIX).partition("-")
            if key in self._found:  # another worker computed it too, with other rounding
                self._drop(key)
            self._found[key] = _Entry(path, sha256, size)
            self._found_bytes += size

    @property
    def num_bytes(self) -> int:
        """File bytes that this process knows of."""
        return self._found_bytes + self._used_bytes

    @abstractmethod
    def packed(self, value: Value) -> dict[str, Tensor]:
        """The tensors of a value by name, contiguous and on any device."""

    @abstractmethod
    def unpacked(self, tensors: dict[str, Tensor]) -> Value:
        """The opposite of `packed`."""

    def _require_own(self, fingerprint: str) -> None:
        info = self._folder / _INFO
        choose = f"choose another {self.setting}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not info.is_file():
                foreign = [p for p in self._folder.iterdir() if not p.name.startswith(".")]
                if foreign and not info.is_file():  # another worker may have just written it
                    raise ArtifactError(
                        f"{self._folder} is no store of {self.holds} and not empty; {choose}"
                    )
                partial = self._folder / f".{uuid.uuid4().hex}.partial"
                own = {"holds": self.holds, "fingerprint": fingerprint}
                partial.write_text(json.dumps(own) + "\n")
                _link(partial, info)
            found = json.loads(info.read_text())
            holds, other = found["holds"], found["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"store {self._folder} cannot be opened: {error!r}; {choose}"
            ) from None
        if holds != self.holds:
            raise ArtifactError(f"{self._folder} holds {holds} and not {self.holds}; {choose}")
        if other != fingerprint:
            raise ArtifactMismatchError(
                f"{self._folder} holds {holds} of {other}, this run's are {fingerprint}; {choose}"
            )

    def __contains__(self, key: str) -> bool:
        return self._entry(_name(key)) is not None

    def _entry(self, name: str) -> _Entry | None:
        return self._used.get(name) or self._found.get(name)

    def get(self, key: str) -> Value | None:
        """The value of a key, or None; a damaged file is removed and counts as missing."""
        name = _name(key)
        entry = self._entry(name)
        if entry is None:
            return None
        try:
            content = entry.path.read_bytes()
        except OSError:  # another process needed the room
            with self._lock:
                self._forget(name)
            return None
        intact = hashlib.sha256(content).hexdigest() == entry.sha256
        with self._lock:
            if not intact:
                self.damaged += 1
                log.warning("%s is damaged; it is computed again", entry.path)
                self._drop(name)
                return None
            if self._forget(name) is not None:  # another thread may have needed the room meanwhile
                self._use(name, entry)
            self.hits += 1
        return self.unpacked(load(content))

    def put(self, key: str, value: Value) -> None:
        """Keep a value; a full disk only ends the writing."""
        name = _name(key)
        if self._full or self._entry(name) is not None:
            return
        content = save(self.packed(value))
        sha256 = hashlib.sha256(content).hexdigest()
        if len(content) > self._max_bytes:
            return
        path = self._folder / name[:2] / f"{name}-{sha256}{_SUFFIX}"
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            self._full = True
            log.warning("store %s is not written to any more: %s", self._folder, error)
            partial.unlink(missing_ok=True)
            return
        with self._lock:
            self._use(name, _Entry(path, sha256, len(content)))
            while self._found and self.num_bytes > self._max_bytes * self._shared_by:
                self._drop(next(iter(self._found)))

    def _use(self, name: str, entry: _Entry) -> None:
        """Note a file as this process's own, and make room for it."""
        self._used[name] = entry
        self._used_bytes += entry.num_bytes
        while self._used_bytes > self._max_bytes:
            self._drop(next(iter(self._used)))

    def _forget(self, name: str) -> _Entry | None:
        used = self._used.pop(name, None)
        if used is not None:
            self._used_bytes -= used.num_bytes
            return used
        found = self._found.pop(name, None)  # another thread may have been first
        if found is not None:
            self._found_bytes -= found.num_bytes
        return found

    def _drop(self, name: str) -> None:
        entry = self._forget(name)
        try:
            if entry is not None:
                entry.path.unlink(missing_ok=True)
        except OSError:
            log.debug("a file of %s could not be removed", name)


def _files(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(modification time in ns, bytes, path) of the stored files; what is evicted meanwhile is left out."""
    for path in folder.glob(f"*/*{_SUFFIX}"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        yield found.st_mtime_ns, found.st_size, path


def _link(partial: Path, target: Path) -> None:
    """Give a file its name unless another process was first."""
    try:
        os.link(partial, target)
    except FileExistsError:
        log.debug("%s is there already", target)
    finally:
        partial.unlink(missing_ok=True)


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
