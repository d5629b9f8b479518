"""Small files on a local disk: JSON that is whole or absent, and digests."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from slq.errors import ArtifactError, StorageError


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a part.

    Raises:
        StorageError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # writers may race
    try:
        with partial.open("w") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error}; free space or choose another folder"
        ) from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable: a file's own fsync does not cover its name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
