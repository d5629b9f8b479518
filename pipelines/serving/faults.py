"""What a client is told when something fails, in OpenAI's shape: its own mistakes in words, our insides never."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayTaskError
from starlette.exceptions import HTTPException

from pipelines.messages import error_body
from pipelines.serving.calls import cause_of
from pipelines.serving.refusal import RequestRefusedError
from slq.errors import (
    ArtifactError,
    ArtifactMismatchError,
    DataError,
    DeadlineError,
    MediaError,
    RefusedVersionError,
    StorageError,
    UnavailableError,
    UnknownModelError,
)

log = logging.getLogger(__name__)
_RETRY_AFTER_S = 1
_KNOWN = (
    DataError,
    ArtifactMismatchError,
    RefusedVersionError,
    StorageError,
    ArtifactError,
    UnavailableError,
    DeadlineError,
    RayTaskError,
)


def answer_in_error_shape(app: FastAPI) -> None:
    """Let an app answer whatever its routes raise in OpenAI's shape."""
    # Starlette raises again what only the handler of Exception answers, so those that are known are named.
    for kind in (Exception, *_KNOWN):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_exception_handler(HTTPException, _on_no_route)
    app.add_exception_handler(RequestRefusedError, _on_refusal)


def _status_of(error: BaseException) -> tuple[int, str]:
    if isinstance(error, ArtifactMismatchError):
        return 409, "fingerprint_mismatch"
    if isinstance(error, UnknownModelError):
        return 404, "model_not_found"
    if isinstance(error, DeadlineError):
        return 504, "timeout"
    if isinstance(error, UnavailableError | StorageError | ArtifactError):
        return 503, "service_unavailable"
    if isinstance(error, RefusedVersionError):
        return 409, "version_refused"
    if isinstance(error, MediaError) and error.reason == "too_many_bytes":
        return 413, "too_large"
    if isinstance(error, DataError):
        return 400, "invalid_request_error"
    return 500, "server_error"


async def on_error(_: Request, error: Exception) -> JSONResponse:
    """The answer to what a route raised, here or in a deployment that it asked."""
    cause = cause_of(error)
    status, kind = _status_of(cause)
    message = str(cause) if status != 500 else "internal error; see the service's log"
    if status == 503 and not isinstance(cause, UnavailableError):  # its words tell hosts and paths
        log.warning("storage fails: %s", cause)
        message = "storage that the service needs cannot be used now; try again later"
    headers = {"retry-after": str(_RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(error_body(message, kind), status, headers=headers)


async def _on_refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestRefusedError)
    return error.answer()


async def _on_bad_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    parts = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
    return JSONResponse(error_body("; ".join(parts), "invalid_request_error"), 400)


async def _on_no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "not_found" if error.status_code == 404 else "invalid_request_error"
    message = f"{request.method} {request.url.path}: {error.detail}; see /docs for the routes"
    return JSONResponse(error_body(message, kind), error.status_code, headers=error.headers)
