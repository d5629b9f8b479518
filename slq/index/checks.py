"""Files that are what was written: read and hashed once, and then only where they changed since.

So loading an index takes as long for many vectors as for few.
"""

from pathlib import Path
from typing import Any

from slq.errors import ArtifactError, StorageError
from slq.files import file_sha256, read_json, write_json

_STAMPS = "checked.json"


def require_files(home: Path, sha256: dict[str, str], *, again: bool = False) -> None:
    """Check files of a folder; one that was checked before and not written to or moved since is not read.

    Args:
        home: The folder.
        sha256: By name.
        again: Read every file, whatever was checked before.

    Raises:
        ArtifactError: A file is missing or is not what was written; it is named.
    """
    stamps = {} if again else _stamps(home)
    for name, recorded in sha256.items():
        if stamps.get(name) != [recorded, *_state(home / name)]:
            require_file(home / name, recorded)
    stamp(home, sha256)


def require_file(path: Path, recorded: str) -> None:
    """Check one file.

    Raises:
        ArtifactError: It is missing or is not what was written.
    """
    if not path.is_file() or file_sha256(path) != recorded:
        raise ArtifactError(
            f"{path} does not match the sha256 in its manifest; rebuild with `slq index`"
        )


def stamp(home: Path, sha256: dict[str, str]) -> None:
    """Note that files are what was written, as they are now; where nothing can be written, they are read each time."""
    stamps = {name: [digest, *_state(home / name)] for name, digest in sha256.items()}
    if stamps != _stamps(home):
        try:
            write_json(home / _STAMPS, stamps)
        except StorageError:
            return


def _stamps(home: Path) -> dict[str, Any]:
    try:
        found = read_json(home / _STAMPS)
    except ArtifactError:
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path) -> tuple[int, int, int]:
    """Size, time of the last write, and inode; zeros where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ino
