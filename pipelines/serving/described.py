"""The app as its OpenAPI description tells it: errors in their shape, forms beside JSON, and keys."""

from typing import Any

from fastapi import FastAPI

from pipelines.messages import ErrorResponse

_MEANINGS = {
    400: "the request cannot be understood or answered",
    401: "no API key, or one that is not known",
    403: "the API key may not do this",
    404: "there is none, or no model of that name",
    408: "the body took too long",
    409: "index and model, or index version and service, do not belong together",
    413: "the body or an image is too large",
    429: "the API key has used up its rate; see Retry-After",
    431: "too many headers",
    503: "too many requests wait, or a part of the service is down; see Retry-After",
    504: "the answer took too long",
}
Responses = dict[int | str, dict[str, Any]]


def _errors(*statuses: int) -> Responses:
    return {
        status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses
    }


TOLD = _errors(400, 401, 403, 409, 413, 429, 431, 503, 504)
"""Refusals of a route that takes nothing."""
ASKED = {**TOLD, **_errors(404, 408)}
"""Refusals of a route that takes a body."""
ADMINISTERED = ASKED
"""Refusals of a route that changes the service."""
_PICTURE = {"schema": {"type": "string", "format": "binary"}}
FOUND: Responses = {
    200: {
        "description": "the image, as it was indexed",
        "content": dict.fromkeys(("image/jpeg", "image/png", "image/webp"), _PICTURE),
    },
    **TOLD,
    **_errors(404),
}
"""Answers of a route that gives an image."""
_FILE = {"type": "string", "format": "binary", "description": "JPEG, PNG or WebP"}
_BODY = {"type": "string", "description": "further fields, as a JSON object"}
_FORMS = {
    "/search": {
        "image": _FILE,
        "text": {"type": "string"},
        "top_k": {"type": "integer", "minimum": 1},
        "mode": {"type": "string", "enum": ["auto", "coarse", "fine"]},
        "rerank_k": {"type": "integer", "minimum": 1},
        "budget_ms": {"type": "number", "minimum": 0},
        "explain": {"type": "boolean"},
        "body": _BODY,
    },
    "/v1/embeddings": {
        "image": {"type": "array", "items": _FILE, "description": "one input each"},
        "input": {"type": "array", "items": {"type": "string"}, "description": "one input each"},
        "body": _BODY,
    },
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


class DescribedApp(FastAPI):
    """FastAPI with what its own description cannot know of what stands before the routes."""

    def openapi(self) -> dict[str, Any]:
        """The description, as /openapi.json gives it."""
        if self.openapi_schema is None:
            described = super().openapi()
            for path, methods in described["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)  # such requests are answered 400
                if path in _FORMS:
                    form = {"schema": {"type": "object", "properties": _FORMS[path]}}
                    methods["post"]["requestBody"]["content"]["multipart/form-data"] = form
            described["components"]["securitySchemes"] = _SCHEMES
            described["security"] = [{}, *({name: []} for name in _SCHEMES)]
        return super().openapi()
