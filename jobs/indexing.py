"""Versions of an index on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.console import err
from pipelines.choosing import CHOICE, CHOICES
from pipelines.index import fill, grow, index, join, require_own, shrink
from pipelines.recipe import Recipe
from slq.engines import FAISS
from slq.errors import ConfigError
from slq.files import read_json
from slq.index import current_version, prune, roll_back, versions
from slq.index.versions import read_manifest

PREVIOUS = "previous"


def change_of(
    further: str | None, unwanted: Path | None, *, compact: bool
) -> Callable[[Recipe], Path | str]:
    """The flow that a command line asks for: `index` or `fill`, or a change of what is there.

    Args:
        further: Location of a data set whose rows are added.
        unwanted: A file with one id a line, of the items that go.
        compact: Whether all segments become one.

    Raises:
        ConfigError: More than one change is asked for, or the file cannot be read.
    """
    if sum((further is not None, unwanted is not None, compact)) > 1:
        raise ConfigError("give at most one of --append, --delete and --compact")
    if further is not None:
        return _of_versions("--append", lambda recipe: grow(recipe, further))
    if unwanted is not None:
        ids = _lines(unwanted)
        return _of_versions("--delete", lambda recipe: shrink(recipe, ids))
    return _of_versions("--compact", join) if compact else build


def _of_versions(change: str, flow: Callable[[Recipe], Path]) -> Callable[[Recipe], Path]:
    """A flow that only an index of faiss has."""

    def checked(recipe: Recipe) -> Path:
        require_own(recipe, change)
        return flow(recipe)

    return checked


def build(recipe: Recipe) -> Path | str:
    """Build the index, or fill the collection of the engine that holds it."""
    return _index_and_tell(recipe) if recipe.index.engine == FAISS else fill(recipe)


def _index_and_tell(recipe: Recipe) -> Path:
    """Build as `index` does; if settings were chosen, show which, and draw them."""
    from jobs.choices import choice_table, write_choice_chart

    folder = index(recipe)
    name = read_manifest(folder, current_version(folder)).source.get(CHOICE)
    if name is not None:
        record = read_json(folder / CHOICES / f"{name}.json")
        err.print(choice_table(record))
        err.print(f"{record['chosen']['name']}: {record['reason']}", highlight=False)
        chart = write_choice_chart(record, folder / CHOICES / f"{name}.png")
        err.print(f"all trials: {chart}", soft_wrap=True)
    return folder


def _lines(path: Path) -> list[str]:
    try:
        return list(dict.fromkeys(line for line in path.read_text().splitlines() if line))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--delete {path}: cannot be read as text: {error}") from None


def changed_versions(folder: Path, back_to: str | None, keep: int | None) -> list[dict[str, Any]]:
    """Roll back and prune as asked, then tell what each version is.

    Args:
        folder: The index folder.
        back_to: A version's name, or `previous`; None to stay.
        keep: Versions to keep; None for all.

    Raises:
        ArtifactError: There is no index or no such version, or a file of it is damaged.
        StorageError: The pointer cannot be written.
    """
    current_version(folder)
    if back_to is not None:
        roll_back(folder, None if back_to == PREVIOUS else back_to)
    if keep is not None:
        prune(folder, keep)
    current = current_version(folder)
    return [_told(folder, name, is_current=name == current) for name in versions(folder)]


def _told(folder: Path, name: str, *, is_current: bool) -> dict[str, Any]:
    manifest = read_manifest(folder, name)
    return {
        "version": name,
        "current": is_current,
        "vectors": manifest.num_vectors,
        "deleted": sum(one.num_deleted for one in manifest.segments),
        "segments": len(manifest.segments),
        "dimension": manifest.dimension,
        "kind": manifest.config["kind"],
        "codes": manifest.config["codes"],
        "fingerprint": manifest.fingerprint,
    }


def versions_table(found: list[dict[str, Any]]) -> Table:
    """Versions as a table, the current one marked."""
    table = Table(box=None)
    for name in ("version", "", "vectors", "deleted", "segments", "dimension", "kind", "codes"):
        table.add_column(
            name, justify="left" if name in {"version", "", "kind", "codes"} else "right"
        )
    table.add_column("fingerprint")
    for one in found:
        table.add_row(
            one["version"],
            "[green]current[/]" if one["current"] else "",
            *(f"{one[name]:,}" for name in ("vectors", "deleted", "segments")),
            str(one["dimension"]),
            one["kind"],
            "" if one["kind"] == "flat" else one["codes"],
            one["fingerprint"][:12],
        )
    return table
