"""Files that are what was written: read and hashed once, and then only where they changed since.

So loading an index takes as long for many vectors as for few.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slq.errors import ArtifactError, StorageError
from slq.files import file_sha256, read_json, write_json

STAMPS = "checked.json"
State = tuple[int, int, int]


@dataclass(frozen=True)
class Digest:
    """What a file was when it was hashed.

    Attributes:
        sha256: Of its bytes.
        state: Before it was read: a change since then must be seen.
    """

    sha256: str
    state: State


def digested(home: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Hash files of a folder.

    Raises:
        OSError: One cannot be read.
    """
    states = states_of(home, names)
    return {name: Digest(file_sha256(home / name), state) for name, state in states.items()}


def require_files(home: Path, sha256: dict[str, str], *, again: bool = False) -> None:
    """Check files of a folder; one that was checked before and not written to or moved since is not read.

    Args:
        home: The folder.
        sha256: By name.
        again: Read every file, whatever was checked before.

    Raises:
        ArtifactError: A file is missing or is not what was written; it is named.
    """
    stamps = {} if again else stamped(home)
    found = {name: Digest(sha256[name], state) for name, state in states_of(home, sha256).items()}
    for name, digest in found.items():
        if stamps.get(name) != digest:
            require_file(home / name, digest.sha256)
    if any(stamps.get(name) != digest for name, digest in found.items()):
        stamp(home, {**stamps, **found})


def require_file(path: Path, recorded: str) -> None:
    """Check one file.

    Raises:
        ArtifactError: It is missing or is not what was written.
    """
    if not path.is_file() or file_sha256(path) != recorded:
        raise ArtifactError(
            f"{path} does not match the sha256 in its manifest; rebuild with `slq index`"
        )


def stamp(home: Path, found: dict[str, Digest]) -> None:
    """Note that files are what was written; where nothing can be written, they are read each time.

    Args:
        home: Their folder.
        found: By name.
    """
    with suppress(StorageError):
        write_json(home / STAMPS, {name: [one.sha256, *one.state] for name, one in found.items()})


def stamped(home: Path) -> dict[str, Digest]:
    """What `stamp` noted; nothing where it did not."""
    try:
        found = read_json(home / STAMPS)
        return {
            name: Digest(sha256, (size, written, inode))
            for name, (sha256, size, written, inode) in found.items()
        }
    except (ArtifactError, AttributeError, TypeError, ValueError):
        return {}


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
