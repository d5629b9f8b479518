"""Request and response bodies: images by bytes only, unknown fields refused, vectors equal in both encodings."""

import base64
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.contents import (
    Content,
    SearchQuery,
    as_content,
    decode_base64,
    items_of,
    vector_of,
)
from pipelines.messages import (
    EmbeddingsRequest,
    Explanation,
    IndexRequest,
    RerankRequest,
    SearchRequest,
    SearchResponse,
    embeddings_response,
    error_body,
)
from slq.errors import DataError, MediaError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (200, 10, 30)).save(buffer, "PNG")
    return buffer.getvalue()


PLAIN = base64.b64encode(png()).decode()


@pytest.mark.parametrize("other", ["text", "image", "embedding"])
def test_an_item_that_others_are_like_is_a_query_of_its_own(other: str) -> None:
    assert SearchQuery(like="").like == ""
    value = [1.0] if other == "embedding" else "x"
    with pytest.raises(ValidationError, match=f"like is a query of its own; leave out {other}"):
        SearchQuery(like="item-7", **{other: value})


@pytest.mark.parametrize("image", [PLAIN, f"data:image/png;base64,{PLAIN}"])
def test_an_image_comes_as_base64_or_as_a_data_uri(image: str) -> None:
    item = Content(image=image).item()
    assert item.image is not None
    assert (item.image.size, item.image.getpixel((0, 0))) == ((6, 5), (200, 10, 30))


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://example.com/a.png",
        "HTTP://x",
        "file:///etc/passwd",
        "ftp://x/a.png",
        "s3://bucket/a.png",
    ],
)
def test_links_are_never_fetched(url: str) -> None:
    with pytest.raises(MediaError, match="image URLs are not fetched; send the bytes") as caught:
        Content(image=url).item()
    assert caught.value.reason == "url_refused"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("data:image/png,abc", "bad_data_uri"),
        ("data:image/png;base64,%%%", "bad_base64"),
        ("not base64!", "bad_base64"),
        ("/etc/passwd?", "bad_base64"),
        ("bildñ", "bad_base64"),
        ("😀😀😀😀", "bad_base64"),
        ("abc", "bad_base64"),
        (base64.b64encode(b"<html></html>").decode(), "unknown_format"),
        ("data:;base64,", "empty"),
    ],
)
def test_an_image_that_cannot_be_used_has_a_reason(image: str, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        Content(image=image).item()
    assert caught.value.reason == reason


def test_decoding_gives_the_bytes_back() -> None:
    assert decode_base64(PLAIN) == decode_base64(f"data:x;base64,{PLAIN}") == png()


@pytest.mark.parametrize("content", [{}, {"text": ""}, {"text": "  \n"}, {"image": ""}])
def test_an_empty_content_is_a_data_error(content: dict[str, str]) -> None:
    with pytest.raises(DataError, match="neither an image nor a text"):
        Content(**content).item()


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (SearchRequest, {"query": {"text": "x"}, "topk": 3}),
        (SearchRequest, {"query": {"text": "x", "imgae": "y"}}),
        (EmbeddingsRequest, {"input": "x", "modle": "slq"}),
        (EmbeddingsRequest, {"input": {"text": "x", "url": "y"}}),
        (EmbeddingsRequest, {"input": ["x", {"txt": "y"}]}),
        (RerankRequest, {"query": "x", "documents": ["y"], "top_k": 3}),
        (RerankRequest, {"query": "x", "documents": [{"txt": "y"}]}),
    ],
)
def test_unknown_fields_are_refused(model: type[SearchRequest], body: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": {"text": "x"}, "top_k": 0},
        {"query": {"text": "x"}, "top_k": "many"},
        {"query": {"text": "x"}, "mode": "best"},
        {"query": {"text": "x"}, "rerank_k": -1},
        {"query": {"text": "x"}, "budget_ms": -1},
        {"query": {"text": "x"}, "budget_ms": float("nan")},
        {"query": {"text": "x"}, "budget_ms": float("inf")},
        {"query": {"text": "x"}, "budget_ms": "soon"},
        {"query": {"text": "x"}, "explain": "why"},
        {"query": "x"},
    ],
)
def test_bad_values_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SearchRequest.model_validate(body)


@pytest.mark.parametrize("budget_ms", [0, 0.5, 1500, None])
def test_a_budget_is_milliseconds_from_nothing_on_or_absent(budget_ms: float | None) -> None:
    request = SearchRequest.model_validate({"query": {"text": "x"}, "budget_ms": budget_ms})
    assert request.budget_ms == budget_ms
    assert SearchRequest.model_validate({"query": {"text": "x"}}).budget_ms is None


@pytest.mark.parametrize(
    "body",
    [
        {"query": "x"},
        {"documents": ["x"]},
        {"query": "x", "documents": "y"},
        {"query": "x", "documents": [1]},
        {"query": "x", "documents": ["y"], "top_n": 0},
        {"query": ["x"], "documents": ["y"]},
    ],
)
def test_bad_values_of_a_rerank_request_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RerankRequest.model_validate(body)


def test_documents_and_query_are_texts_images_or_both_and_no_document_is_decoded() -> None:
    request = RerankRequest.model_validate(
        {
            "query": {"text": "a", "image": PLAIN},
            "documents": ["b", {"image": PLAIN}, {"text": "c", "image": "no base64!"}],
        }
    )
    assert as_content(request.query).item().modality == "image+text"
    first, second, third = request.contents()
    assert (first.item().text, second.item().modality) == ("b", "image")
    with pytest.raises(MediaError):
        third.item()


def test_an_explanation_tells_what_was_read() -> None:
    said = {
        "margin": 0.0, "probability": 0.5, "label_mass": 0.25, "entropy": 1.5, "is_doubtful": True,
    }  # fmt: skip
    assert Explanation.model_validate(said).model_dump() == {**said, "is_match": None}
    with pytest.raises(ValidationError, match="label_mass"):
        Explanation.model_validate({**said, "label_mass": None})  # of the labels alone


def test_both_encodings_of_embeddings_hold_the_same_numbers() -> None:
    vectors = list(np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32))
    answers = {
        kind: embeddings_response(
            vectors, EmbeddingsRequest(input=["a", "b", "c"], encoding_format=kind), 5
        )
        for kind in ("float", "base64")
    }
    for n, vector in enumerate(vectors):
        as_float = answers["float"]["data"][n]
        packed = base64.b64decode(answers["base64"]["data"][n]["embedding"])
        # OpenAI's client reads little-endian float32
        assert list(struct.unpack("<8f", packed)) == as_float["embedding"] == vector.tolist()
        assert (as_float["index"], as_float["object"]) == (n, "embedding")
    assert answers["float"]["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    json.dumps(answers)


def test_inputs_are_texts_images_or_both_alone_or_in_a_list() -> None:
    (only,) = EmbeddingsRequest(input="a").contents()
    assert only.item().text == "a"
    request = EmbeddingsRequest.model_validate(
        {"input": ["a", {"image": PLAIN}, {"text": "c", "image": PLAIN}]}
    )
    items = items_of(request.contents(), max_pixels=60)
    assert [item.modality for item in items] == ["text", "image", "image+text"]
    with pytest.raises(MediaError, match="more than 59 pixels together"):
        items_of(request.contents(), max_pixels=59)


def test_a_given_vector_becomes_a_unit_float32_vector() -> None:
    vector = vector_of(SearchQuery(embedding=[3.0, -4.0]), 2)
    assert vector is not None
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, [0.6, -0.8], rtol=1e-6)
    assert vector_of(SearchQuery(text="x"), 2) is None


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e20, 3e38])
def test_the_length_of_a_given_vector_does_not_matter(scale: float) -> None:
    vector = vector_of(SearchQuery(embedding=[scale, scale]), 2)
    np.testing.assert_allclose(vector, [0.5**0.5] * 2, rtol=1e-6)


def test_a_given_vector_must_fit_the_index() -> None:
    with pytest.raises(DataError, match=r"query\.embedding has 3 values; this index has 2"):
        vector_of(SearchQuery(embedding=[0.0, 1.0, 2.0]), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, -1e300])
def test_a_given_vector_must_be_finite_in_float32(value: float) -> None:
    with pytest.raises(DataError, match="NaN, infinity or a value too large for float32"):
        vector_of(SearchQuery(embedding=[value, 1.0]), 2)


@pytest.mark.parametrize("value", [0.0, 1e-60])  # the second one underflows
def test_a_given_vector_must_have_a_direction(value: float) -> None:
    with pytest.raises(DataError, match="norm 0"):
        vector_of(SearchQuery(embedding=[value, value]), 2)


@pytest.mark.parametrize(
    ("given", "count"), [("a", 1), ({"text": "a"}, 1), ([], 0), (["a", {"image": "no base64!"}], 2)]
)
def test_inputs_are_counted_before_any_is_decoded(given: object, count: int) -> None:
    assert EmbeddingsRequest.model_validate({"input": given}).num_inputs == count


def test_errors_have_the_shape_that_openai_clients_read() -> None:
    assert error_body("no", "invalid_request_error", "c") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "c"}
    }


def test_the_examples_in_the_documentation_are_valid() -> None:
    for model in (SearchRequest, EmbeddingsRequest, RerankRequest):
        model.model_validate(model.model_json_schema()["example"])
    assert "timings_ms" in SearchResponse.model_json_schema()["properties"]


@pytest.mark.parametrize("version", ["v000001", "v1234567", "current", "previous"])
def test_a_service_can_be_sent_to_a_version(version: str) -> None:
    assert IndexRequest(version=version).version == version


@pytest.mark.parametrize(
    "version", ["", "v1", "newest", "v000001/", "../v000001", "v000001\n", "V000001", "/v000001"]
)
def test_what_is_no_name_of_a_version_is_refused(version: str) -> None:
    with pytest.raises(ValidationError, match="version"):
        IndexRequest(version=version)


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}


def test_a_chat_is_one_input_of_its_texts_and_its_image() -> None:
    body = EmbeddingsRequest.model_validate(chat({"type": "text", "text": "a"}, IMAGE))
    (content,) = body.contents()
    assert (content.text, content.image) == ("a", "data:image/png;base64,aGk=")
    assert body.num_inputs == 1
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    (content,) = EmbeddingsRequest.model_validate(plain).contents()
    assert (content.text, content.image) == ("a\nb", None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either `input` or `messages`"),
        ({"input": "x", **chat(IMAGE)}, "either `input` or `messages`"),
        ({"messages": []}, "at least 1"),
        (chat(), "at least 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        (chat({"type": "audio", "text": "x"}), "type"),
        (chat({"type": "image_url", "image_url": {"uri": "x"}}), "url"),
    ],
)
def test_a_chat_that_is_no_input_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EmbeddingsRequest.model_validate(body)


def test_a_chat_of_several_images_is_refused() -> None:
    with pytest.raises(DataError, match="hold 2 images; an item has one"):
        EmbeddingsRequest.model_validate(chat(IMAGE, IMAGE)).contents()
