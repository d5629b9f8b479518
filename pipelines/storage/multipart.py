"""Large files into S3, part by part: a part that fails is sent again by itself, and few are in memory at once.

s3fs holds ten parts of 50 MB, and starts all over when one fails: of a shard of 470 MB no upload would get through a
store that fails one request in five.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.storage.base import concurrently

PART_BYTES = 32 * 2**20
_MOST_PARTS = 10_000  # of S3
_NUM_THREADS = 4


def upload_parts(
    once: Callable[..., Any], patiently: Callable[..., Any], file: Path, bucket: str, key: str
) -> None:
    """Upload a file; it is seen when its last part has arrived.

    Args:
        once: `once(operation, **arguments)` of an S3 client.
        patiently: The same, which tries again what may pass.
        file: Not empty.
        bucket: Where to.
        key: Its name there.

    Raises:
        FileNotFoundError: There is no such bucket.
    """
    size = file.stat().st_size
    part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
    begun = patiently("create_multipart_upload", Bucket=bucket, Key=key)
    place = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}

    def upload_part(number: int) -> dict[str, Any]:
        with file.open("rb") as handle:
            handle.seek((number - 1) * part_bytes)
            body = handle.read(part_bytes)
        answer = patiently("upload_part", PartNumber=number, Body=body, **place)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    numbers = range(1, -(-size // part_bytes) + 1)
    try:
        parts = list(concurrently(upload_part, numbers, num_threads=_NUM_THREADS))
        _complete(patiently, parts, place)
    except Exception:
        with contextlib.suppress(Exception):  # what went wrong first is the one to tell
            once("abort_multipart_upload", **place)
        raise


def _complete(call: Callable[..., Any], parts: list[dict[str, Any]], place: dict[str, Any]) -> None:
    try:
        call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **place)
    except FileNotFoundError:
        return  # no such upload any more: the answer was lost. The caller looks at what arrived
