"""Whatever the OpenAPI description allows and forbids: no answer that it does not tell of, and never a 500."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pipelines.messages import EmbeddingsRequest, RerankRequest, SearchRequest
from pipelines.serving.ingress import app
from tests.unit.front import Front, png

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
ROUTES = [(method.upper(), path) for path, of in app.openapi()["paths"].items() for method in of]
CASES = [
    (*route, mode)
    for route in ROUTES
    for mode in schemathesis.GenerationMode
    if route[0] == "POST" or mode.is_positive  # the others take nothing that could be wrong
]
BOUNDED = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    picture = tmp_path_factory.mktemp("contract") / "picture.png"
    picture.write_bytes(png())
    with pytest.MonkeyPatch.context() as patch:
        yield Front(patch, picture, access={"body_timeout_s": 60})


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_one_that_the_description_tells_of(
    front: Front, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @hypothesis.seed(1)
    @BOUNDED
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    holds()


def test_the_description_tells_of_refusals_forms_and_keys(front: Front) -> None:
    described = front.client.get("/openapi.json").json()
    assert {path for _, path in ROUTES} >= {"/search", "/v1/embeddings", "/v1/rerank", "/info"}
    for path, method in ((path, method) for method, path in ROUTES if path != "/"):
        answers = described["paths"][path][method.lower()]["responses"]
        assert "422" not in answers
        for status in ("401", "403", "429", "503", "504"):
            shape = answers[status]["content"]["application/json"]["schema"]
            assert shape == {"$ref": "#/components/schemas/ErrorResponse"}
    for path, model in (
        ("/search", SearchRequest),
        ("/v1/embeddings", EmbeddingsRequest),
        ("/v1/rerank", RerankRequest),
    ):
        content = described["paths"][path]["post"]["requestBody"]["content"]
        reference = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert described["components"]["schemas"][reference]["example"] == example_of(model)
        assert ("multipart/form-data" in content) is (path != "/v1/rerank")
    assert set(described["components"]["securitySchemes"]) == {"bearer", "header"}


def example_of(model: type[Any]) -> Any:
    return model.model_json_schema()["example"]


def test_fields_of_forms_are_those_of_the_json_body(front: Front) -> None:
    paths = front.client.get("/openapi.json").json()["paths"]
    form = paths["/search"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    known = {*SearchRequest.model_fields, "text", "image", "embedding", "body"} - {"query"}
    assert set(form["properties"]) <= known
