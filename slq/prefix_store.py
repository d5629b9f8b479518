"""Image prefixes on disk: content-addressed, bounded in bytes, checked when read.

A store belongs to one backbone with its settings. A file is named by its key and the sha256 of its content, so a
damaged one is found and computed again, and files appear whole or not at all.
"""

import hashlib
import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from slq.errors import ArtifactError, ArtifactMismatchError
from slq.prefix import Prefix

log = logging.getLogger(__name__)
_INFO = "store.json"
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    sha256: str
    num_bytes: int


class PrefixStore:
    """Single-row prefixes by key.

    Several processes may share a folder; each bounds what it has seen, and finds what the others wrote before it opened
    the store. A store that cannot be written to any more is read on.

    Args:
        folder: Made if it is missing.
        fingerprint: What the prefixes depend on: backbone, processor, prompt, type.
        max_bytes: File bytes kept; the least recently used files go first.

    Attributes:
        hits: Prefixes that were found.
        damaged: Files that did not match their name.
        num_bytes: File bytes that this process knows of.

    Raises:
        ArtifactMismatchError: The folder holds prefixes of another backbone; both fingerprints are named.
        ArtifactError: The folder holds something else, or cannot be made.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._full = False
        self.hits = 0
        self.damaged = 0
        self.num_bytes = 0
        self._require_own(fingerprint)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        for _, size, path in sorted(_files(folder)):
            key, _, sha256 = path.name.removesuffix(_SUFFIX).partition("-")
            if key in self._entries:  # another worker computed it too, with other rounding
                self._drop(key)
            self._entries[key] = _Entry(path, sha256, size)
            self.num_bytes += size

    def _require_own(self, fingerprint: str) -> None:
        info = self._folder / _INFO
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not info.is_file():
                foreign = [p for p in self._folder.iterdir() if not p.name.startswith(".")]
                if foreign and not info.is_file():  # another worker may have just written it
                    raise ArtifactError(
                        f"{self._folder} is no prefix store and not empty; choose another train.disk_cache"
                    )
                partial = self._folder / f".{uuid.uuid4().hex}.partial"
                partial.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
                _link(partial, info)
            found = json.loads(info.read_text())["fingerprint"]
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"prefix store {self._folder} cannot be opened: {error}; choose another train.disk_cache"
            ) from None
        if found != fingerprint:
            raise ArtifactMismatchError(
                f"prefix store {self._folder} holds prefixes of {found}, this run's are {fingerprint}; "
                "choose another train.disk_cache"
            )

    def __contains__(self, key: str) -> bool:
        return _name(key) in self._entries

    def get(self, key: str) -> Prefix | None:
        """The (1-row) prefix of a key, or None; a damaged file is removed and counts as missing."""
        name = _name(key)
        entry = self._entries.get(name)
        if entry is None:
            return None
        try:
            content = entry.path.read_bytes()
        except OSError:  # another process needed the room
            self.num_bytes -= self._entries.pop(name).num_bytes
            return None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            self.damaged += 1
            log.warning("prefix %s is damaged; it is computed again", entry.path)
            self._drop(name)
            return None
        self._entries.move_to_end(name)
        self.hits += 1
        return _unpacked(content)

    def put(self, key: str, row: Prefix) -> None:
        """Keep a single-row prefix; a full disk only ends the writing."""
        name = _name(key)
        if self._full or name in self._entries:
            return
        content = _packed(row)
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
            log.warning("prefix store %s is not written to any more: %s", self._folder, error)
            partial.unlink(missing_ok=True)
            return
        self._entries[name] = _Entry(path, sha256, len(content))
        self.num_bytes += len(content)
        while self._entries and self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name)
        self.num_bytes -= entry.num_bytes
        try:
            entry.path.unlink(missing_ok=True)
        except OSError:
            log.debug("%s could not be removed", entry.path)


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


def _packed(row: Prefix) -> bytes:
    return save(
        {
            "keys": torch.cat(row.keys).contiguous(),
            "values": torch.cat(row.values).contiguous(),
            "mask": row.mask.contiguous(),
            "next_position": row.next_position.contiguous(),
            "last_hidden": row.last_hidden.contiguous(),
            "shows_image": row.shows_image.contiguous(),
        }
    )


def _unpacked(content: bytes) -> Prefix:
    tensors = load(content)
    return Prefix(
        keys=torch.split(tensors["keys"], 1),
        values=torch.split(tensors["values"], 1),
        mask=tensors["mask"],
        next_position=tensors["next_position"],
        last_hidden=tensors["last_hidden"],
        shows_image=tensors["shows_image"],
    )
