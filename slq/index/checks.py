"""Files that are what was written: read and hashed once, and then only where they changed since.

So loading an index takes as long for many vectors as for few.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from slq.errors import ArtifactError, StorageError
from slq.files import file_sha256, read_json, write_json

_STAMPS = "checked.json"
State = tuple[int, int, int]


def require_files(home: Path, sha256: dict[str, str], *, again: bool = False) -> None:
    """Check files of a folder; one that was checked before and not written to or moved since is not read.

    Args:
        home: The folder.
        sha256: By name.
        again: Read every file, whatever was checked before.

    Raises:
        ArtifactError: A file is missing or is not what was written; it is named.
    """
    stamps, states = {} if again else _stamps(home), states_of(home, sha256)
    for name, recorded in sha256.items():
        if stamps.get(name) != [recorded, *states[name]]:
            require_file(home / name, recorded)
    stamp(home, sha256, states)


def require_file(path: Path, recorded: str) -> None:
    """Check one file.

    Raises:
        ArtifactError: It is missing or is not what was written.
    """
    if not path.is_file() or file_sha256(path) != recorded:
        raise ArtifactError(
            f"{path} does not match the sha256 in its manifest; rebuild with `slq index`"
        )


def stamp(home: Path, sha256: dict[str, str], states: dict[str, State]) -> None:
    """Note that files are what was written; where nothing can be written, they are read each time.

    Args:
        home: Their folder.
        sha256: By name.
        states: As they were before they were hashed: a change since then must be seen.
    """
    stamps = {name: [digest, *states[name]] for name, digest in sha256.items()}
    if stamps != _stamps(home):
        with suppress(StorageError):
            write_json(home / _STAMPS, stamps)


def _stamps(home: Path) -> dict[str, Any]:
    try:
        found = read_json(home / _STAMPS)
    except ArtifactError:
        return {}
    return found if isinstance(found, dict) else {}


def states_of(home: Path, names: Iterable[str]) -> dict[str, State]:
    """Size, time of the last write, and inode of files; zeros where there is none."""
    found = {}
    for name in names:
        try:
            state = (home / name).stat()
            found[name] = state.st_size, state.st_mtime_ns, state.st_ino
        except OSError:
            found[name] = 0, 0, 0
    return found
