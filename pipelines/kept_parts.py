"""What the parts of a long step have given, in files: the same step, begun again, does only what is missing."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slq.errors import StorageError
from slq.media import pixels_sha256
from slq.schema import Item

Arrays = dict[str, NDArray[Any]]


class KeptParts:
    """Arrays of each part of a step, for as long as nothing changes that they depend on.

    Args:
        folder: Of the files; made when the first part is kept.
        identity: All that the arrays depend on, as JSON.
    """

    def __init__(self, folder: Path, identity: Any) -> None:
        self._folder = folder
        told = json.dumps(identity, sort_keys=True, default=str)
        self._metadata = {"identity": hashlib.sha256(told.encode()).hexdigest()}

    def get(self, number: int) -> Arrays | None:
        """Arrays of a part; None where there are none, or others', or a file is damaged."""
        try:
            with safe_open(self._path(number), "numpy") as file:
                if file.metadata() != self._metadata:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, number: int, arrays: Arrays) -> None:
        """Keep a part.

        Raises:
            StorageError: It cannot be written.
        """
        path = self._path(number)
        partial = path.with_name(f".{path.name}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: np.ascontiguousarray(v) for k, v in arrays.items()},
                partial,
                metadata=self._metadata,
            )
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{path} cannot be written: {error}; free space or choose another folder"
            ) from None

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:03d}.safetensors"


def content_digest(*groups: Sequence[Item]) -> str:
    """sha256 of everything that a model sees of items: ids, texts and pixels, group by group."""
    digest = hashlib.sha256()
    for items in groups:
        for item in items:
            pixels = None if item.image is None else pixels_sha256(item.image)
            digest.update(json.dumps([item.id, item.text, pixels]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
