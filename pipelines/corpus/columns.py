"""Columns of tables: which of them are ours, whatever the user calls them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from slq.errors import ConfigError, DataError

OWN = ("id", "image", "text", "uri")


@dataclass(frozen=True, slots=True)
class Columns:
    """What the user's tables call our columns.

    Attributes:
        names: Our name -> the table's; ours where it is not given.

    Raises:
        ConfigError: A name is none of ours, or two of ours share a column.
    """

    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(OWN))
        if unknown:
            raise ConfigError(
                f"data.columns.{unknown[0]} is unknown; {', '.join(OWN)} are mapped to columns of the table"
            )
        if len(set(self.names.values())) < len(self.names):
            raise ConfigError(f"data.columns gives one column two meanings: {dict(self.names)}")

    def find(self, present: Collection[str], where: str) -> dict[str, str]:
        """Our columns among those of a table: our name -> the table's.

        Args:
            present: The table's columns.
            where: The table, for messages.

        Raises:
            DataError: A column that was named is not there, or none of `image`, `text` and `uri` is.
        """
        for own, name in self.names.items():
            if name not in present:
                raise DataError(
                    f"{where} has no column {name!r}, which data.columns names for {own}; it has {sorted(present)}"
                )
        taken = set(self.names.values())
        found = {own: own for own in OWN if own in present and own not in taken} | dict(self.names)
        if not found.keys() & {"image", "text", "uri"}:
            raise needs_columns(where, "one of `image`, `text`, `uri`", present)
        return found

    def find_links(self, present: Collection[str], where: str) -> dict[str, str]:
        """As `find`, of a manifest: images stand in files of their own.

        Raises:
            DataError: As `find`; or there is a column of images, which a manifest cannot hold.
        """
        found = self.find(present, where)
        if "image" in found:
            raise DataError(
                f"{where}: column {found['image']} is read as image bytes, which a manifest cannot hold; if it names "
                f"files, set data.columns to {{uri: {found['image']}}}"
            )
        return found


def needs_columns(where: str, what: str, present: Collection[str]) -> DataError:
    """The error of a table that lacks columns of ours."""
    return DataError(
        f"{where} needs {what}; it has {sorted(present)}: name the columns that are meant in data.columns"
    )
