"""Why a request does not reach its route."""

from collections.abc import Mapping

from fastapi.responses import JSONResponse

from pipelines.messages import error_body


class RequestRefusedError(Exception):
    """A request is refused before its route has begun.

    Attributes:
        status: Of the answer.
        kind: The error's type, in OpenAI's words where it has one.
        headers: Of the answer.
        code: The error's code.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers, self.code = status, kind, headers, code

    def answer(self) -> JSONResponse:
        """What the client is told, in OpenAI's shape."""
        body = error_body(str(self), self.kind, self.code)
        return JSONResponse(body, self.status, headers=self.headers)
