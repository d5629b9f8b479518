"""Images that a table names by uri: files of the table's own folder, or objects on S3."""

from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.corpus import fetch_image
from slq.errors import DataError, MediaError, StorageError
from slq.media import DEFAULT_LIMITS, check_image

_HEAD_BYTES = 2**18  # nearly every picture's header, with its thumbnail and colour profile


class ImageReader:
    """Reads the images that a table names; threads may share it.

    Args:
        folder: The table's folder. A table that came from elsewhere must not read the rest of the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def read(self, uri: str) -> bytes:
        """The encoded image behind a uri.

        Raises:
            DataError: There is none, it may not be read, or a path leads out of the folder.
            StorageError: The store cannot be reached.
        """
        if uri.startswith("s3://"):  # one byte more than allowed, so that decoding refuses it
            return self._object(uri, DEFAULT_LIMITS.max_bytes + 1)
        data = fetch_image(str(self._file(uri)))
        if data is None:
            raise DataError(f"{uri} names a row without an image")
        return data

    def check(self, uri: str) -> None:
        """Refuse an image whose header cannot be read or breaks the limits.

        Raises:
            DataError: As `read`; MediaError if it is no image, or too large a one.
            StorageError: The store cannot be reached.
        """
        if not uri.startswith("s3://"):
            check_image(self.read(uri))
            return
        head = self._object(uri, _HEAD_BYTES)
        try:
            check_image(head)
        except MediaError:
            if len(head) < _HEAD_BYTES:
                raise
            check_image(self.read(uri))

    def _file(self, uri: str) -> Path:
        try:
            path = (self._folder / uri).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
            raise DataError(f"{uri!r} names no file: {error}") from None
        if "://" in uri or not path.is_relative_to(self._folder):
            raise DataError(
                f"{uri!r} is no file below {self._folder}, the table's own folder, and no s3:// object"
            )
        return path

    def _object(self, uri: str, num_bytes: int) -> bytes:
        """The first bytes of an object."""
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        try:
            data: bytes = self._s3.cat_file(uri, start=0, end=num_bytes)
        except OSError as error:  # s3fs makes one of every answer of the store
            raise DataError(f"{uri} cannot be read: {error}") from None
        except (BotoCoreError, ClientError) as error:
            raise StorageError(
                f"{uri} cannot be read: {error}; check AWS_ENDPOINT_URL, the credentials and the network"
            ) from None
        return data

    @cached_property
    def _s3(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem()
