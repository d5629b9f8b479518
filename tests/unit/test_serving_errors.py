"""What a client is told when something fails: its own mistakes in words, our insides never."""

import asyncio
import json

import pytest
from fastapi import Request
from ray.exceptions import RayTaskError

from pipelines.serving.faults import on_error
from slq.errors import (
    ArtifactError,
    ArtifactMismatchError,
    DataError,
    MediaError,
    RefusedVersionError,
    SlqError,
    StorageError,
    UnavailableError,
)

ANSWERS = [
    (DataError("top_k is 0"), 400, "invalid_request_error", "top_k is 0"),
    (MediaError("too_many_bytes", "9 bytes"), 413, "too_large", "9 bytes"),
    (ArtifactMismatchError("3f2a, not 77aa"), 409, "fingerprint_mismatch", "3f2a, not 77aa"),
    (RefusedVersionError("v2 is refused"), 409, "version_refused", "v2 is refused"),
    (UnavailableError("too many wait"), 503, "service_unavailable", "too many wait"),
    (
        StorageError("milvus at 10.0.0.9:19530 is down"),
        503,
        "service_unavailable",
        "storage that the service needs cannot be used now; try again later",
    ),
    (
        ArtifactError("/runs/10.0.0.9/CURRENT is damaged"),
        503,
        "service_unavailable",
        "storage that the service needs cannot be used now; try again later",
    ),
    (SlqError("secret"), 500, "server_error", "internal error; see the service's log"),
    (ValueError("secret"), 500, "server_error", "internal error; see the service's log"),
]


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "message"), ANSWERS)
def test_a_failure_is_told_in_the_error_shape(
    error: Exception, status: int, kind: str, message: str, *, is_remote: bool
) -> None:
    raised = RayTaskError("search", "a traceback", error) if is_remote else error
    answer = asyncio.run(on_error(Request({"type": "http"}), raised))
    said = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, said["type"]) == (status, kind)
    assert message in said["message"]
    assert "secret" not in said["message"]
    assert "10.0.0.9" not in said["message"]
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
