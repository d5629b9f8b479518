"""What stands before the routes: lengths, slow clients, headers, deep JSON, forms, bombs; never a 500."""

import asyncio
import base64
import json
import logging
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL.PngImagePlugin import PngImageFile
from starlette.types import Message, Scope

from pipelines.serving.bodies import BodyLimits, ClientGoneError, read_body
from pipelines.serving.config import ServeConfig
from pipelines.serving.ingress import app
from pipelines.serving.refusal import RequestRefusedError
from slq.media import decode_image
from tests.unit.front import DIMENSION, Front, bomb, png, refusal

MAX_BYTES = 200_000
JSON = {"content-type": "application/json"}
POSTS = ["/search", "/v1/embeddings", "/v1/rerank", "/admin/index"]


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Front:
    (tmp_path / "picture.png").write_bytes(png("red"))
    return Front(
        monkeypatch,
        tmp_path / "picture.png",
        max_body_bytes=MAX_BYTES,
        max_inputs=8,
        max_top_k=20,
        max_rerank=6,
        access={"body_timeout_s": 0.2},
    )


def asked(
    messages: Iterable[Message | float],
    headers: Iterable[tuple[bytes, bytes]] = (),
    path: str = "/search",
    method: str = "POST",
) -> tuple[int, dict[str, str], Any]:
    """The answer of the app to a request that comes in these pieces; a number is seconds of silence."""
    pieces = iter(messages)
    told: list[Message] = []

    async def receive() -> Message:
        for piece in pieces:
            if not isinstance(piece, float):
                return piece
            await asyncio.sleep(piece)
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        told.append(message)

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))
    if not told:
        return 0, {}, None
    body = b"".join(one.get("body", b"") for one in told[1:])
    answered = {name.decode(): value.decode() for name, value in told[0]["headers"]}
    return told[0]["status"], answered, json.loads(body)


def piece(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


GOOD = b'{"query": {"text": "a cat"}}'

# ---- bodies ----


def test_a_body_in_pieces_is_the_body(front: Front) -> None:
    whole = asked([piece(GOOD)])
    pieces = asked([*(piece(bytes([byte]), more=True) for byte in GOOD), piece(b"")])
    assert whole[0] == pieces[0] == 200
    assert whole[2]["results"] == pieces[2]["results"]


@pytest.mark.parametrize(
    "headers", [[], [(b"content-length", b"10")], [(b"transfer-encoding", b"chunked")]]
)
def test_a_body_is_counted_whatever_its_headers_say(
    front: Front, headers: list[tuple[bytes, bytes]]
) -> None:
    count = 0

    def endless() -> Iterable[Message]:
        nonlocal count
        while True:
            count += 1
            yield piece(b" " * 1000, more=True)

    status, _, body = asked(endless(), headers)
    assert (status, body["error"]["type"]) == (413, "too_large")
    assert count == MAX_BYTES // 1000 + 1


def test_a_body_that_is_announced_as_too_long_is_not_read(front: Front) -> None:
    def unread() -> Iterable[Message]:
        raise AssertionError("it was read")
        yield

    status, _, body = asked(unread(), [(b"content-length", str(MAX_BYTES + 1).encode())])
    assert (status, body["error"]["message"]) == (413, f"the body exceeds {MAX_BYTES} bytes")


@pytest.mark.parametrize(
    "values",
    [["-1"], ["+5"], ["1e3"], ["ten"], [""], ["0x10"], ["1, 2"], ["1", "2"], ["9" * 30], ["٣"]],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_length_that_is_no_number_is_a_400(front: Front, values: list[str], method: str) -> None:
    headers = [(b"content-length", value.encode()) for value in values]
    status, _, body = asked(
        [piece(GOOD)], headers, "/info" if method == "GET" else "/search", method
    )
    assert status == 400
    assert "content-length must be" in body["error"]["message"]


def test_two_ways_to_tell_the_length_are_refused(front: Front) -> None:
    headers = [(b"content-length", b"28"), (b"transfer-encoding", b"chunked")]
    assert asked([piece(GOOD)], headers)[0] == 400


@pytest.mark.parametrize(
    "messages",
    [
        [9.0],
        [piece(GOOD[:5], more=True), 9.0],
        [part for byte in GOOD for part in (piece(bytes([byte]), more=True), 0.05)],
    ],
    ids=["silent", "stops", "drips"],
)
def test_a_slow_client_is_cut_off(front: Front, messages: list[Any]) -> None:
    status, headers, body = asked(messages)
    assert (status, body["error"]["type"]) == (408, "timeout")
    assert headers["connection"] == "close"
    assert "within 0.2 s" in body["error"]["message"]


def test_a_client_that_goes_away_is_not_answered(front: Front) -> None:
    assert asked([piece(GOOD[:5], more=True), {"type": "http.disconnect"}]) == (0, {}, None)
    assert front.backbone.tenants == []


def test_reading_gives_what_was_sent_within_both_limits() -> None:
    async def scenario() -> None:
        async def gone() -> Message:
            return {"type": "http.disconnect"}

        async def exact() -> Message:
            return piece(b"12345")

        assert await read_body(exact, BodyLimits(5, 1)) == b"12345"
        with pytest.raises(RequestRefusedError, match="exceeds 4 bytes"):
            await read_body(exact, BodyLimits(4, 1))
        with pytest.raises(ClientGoneError):
            await read_body(gone, BodyLimits(5, 1))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in ("/", "/docs", "/openapi.json")),
        *(("PUT", path) for path in ("/healthz", "/readyz", "/metrics")),
        *((method, "/info") for method in ("GET", "HEAD", "OPTIONS", "DELETE")),
        ("GET", "/metrics"),
        ("DELETE", "/admin/adapters/x"),
    ],
)
@pytest.mark.parametrize(
    "header",
    [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
    ids=["length", "none"],
)
def test_a_body_where_none_is_taken_is_refused_and_not_read(
    front: Front, method: str, path: str, header: tuple[bytes, bytes]
) -> None:
    def unread() -> Iterable[Message]:
        raise AssertionError("it was read")
        yield

    status, _, body = asked(unread(), [header], path, method)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert body["error"]["message"] == f"{method} {path} takes no body; send none"
    answer = front.client.request(method, path, headers={"content-length": "0"})
    assert answer.status_code != 400


# ---- headers ----


@pytest.mark.parametrize(
    "headers", [{f"x-{n}": "y" for n in range(101)}, {"x-long": "y" * 40_000}, {"y" * 40_000: "x"}]
)
def test_too_many_headers_are_refused(front: Front, headers: dict[str, str]) -> None:
    assert refusal(front.client.get("/healthz", headers=headers), 431)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-1.2_3", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("", False),
        ("a b", False),
        ("a\x1b[31m", False),
        ("a%0d%0aset-cookie: x", False),
        ("ä", False),
        ("<script>", False),
    ],
)
def test_only_a_plain_request_id_is_taken_over(front: Front, given: str, *, is_kept: bool) -> None:
    answer = front.client.get("/healthz", headers=[(b"x-request-id", given.encode("latin-1"))])
    told = answer.headers["x-request-id"]
    assert (told == given) is is_kept
    assert is_kept or len(told) == 32


@pytest.mark.parametrize("path", ["/", "/healthz", "/absent", "/items/item-0/image", "/docs"])
def test_no_answer_is_sniffed(front: Front, path: str) -> None:
    assert front.client.get(path).headers["x-content-type-options"] == "nosniff"


# ---- JSON that means harm ----

DEEP = 50_000
HARMFUL = {
    "arrays": "[" * DEEP,
    "closed": "[" * DEEP + "]" * DEEP,
    "objects": '{"query":' * (DEEP // 10) + "1" + "}" * (DEEP // 10),
    "middling": '{"query":' + "[" * 700 + "]" * 700 + "}",
    "inside": '{"query": {"text": ' + "[" * DEEP + "]" * DEEP + "}}",
    "list": '{"input": [' + "1," * 60_000 + '1], "query": "x"}',
    "documents": '{"query": "x", "documents": [' + "1," * 60_000 + "1]}",
    "vector": '{"query": {"embedding": [' + '"x",' * 40_000 + '"x"]}}',
    "fields": "{" + ",".join(f'"k{n}":1' for n in range(15_000)) + "}",
    "inner": '{"query": {' + ",".join(f'"k{n}":1' for n in range(15_000)) + "}}",
    "name": '{"' + "k" * 100_000 + '": 1}',
    "number": '{"query": {"text": "x"}, "top_k": ' + "9" * 10_000 + "}",
    "surrogate": '{"\\ud800": 1, "query": {"text": "\\udfff"}, "model": "\\ud800"}',
    "utf8": b'{"query": {"text": "\xff\xfe"}}',
    "utf16": '{"query": {"tex": "x"}}'.encode("utf-16"),
    "nul": "\x00" * 1000,
    "empty": "",
    "null": "null",
    "text": '"query"',
    "nan": '{"query": {"text": "x"}, "budget_ms": NaN}',
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", HARMFUL)
def test_no_json_makes_more_than_a_short_400(front: Front, path: str, kind: str) -> None:
    body = HARMFUL[kind]
    content = body if isinstance(body, bytes) else body.encode()
    assert len(content) <= MAX_BYTES
    tracemalloc.start()
    answer = front.client.post(path, content=content, headers=JSON)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(refusal(answer, 400)["message"]) <= 2000
    assert peak < 30 * 2**20


@pytest.mark.parametrize("shape", ["[],", "{},", "1,", "[", '{"a":', '"",', '"[",'])
@pytest.mark.parametrize("place", ["json", "body", "field"])
def test_more_values_than_can_be_read_at_once_are_not_read(
    front: Front, monkeypatch: pytest.MonkeyPatch, shape: str, place: str
) -> None:
    monkeypatch.setattr(front.ingress, "settings", ServeConfig())
    many = '{"query": {"text": "\\"x"}, "filter": [' + shape * 100_001
    if place == "json":
        answer = front.client.post("/search", content=many.encode(), headers=JSON)
    elif place == "body":
        answer = form(front, "/search", {"image": ("x.png", png())}, body=many)
    else:
        answer = form(front, "/search", {"image": ("x.png", png())}, embedding=many)
    assert "more than 100000 values" in refusal(answer, 400)["message"]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("place", ["json", "body", "field"])
def test_values_cannot_hide_in_another_encoding(
    front: Front, monkeypatch: pytest.MonkeyPatch, codec: str, place: str
) -> None:
    """In UTF-16 a letter may hold the byte of a quotation mark, behind which values would not be counted."""
    monkeypatch.setattr(front.ingress, "settings", ServeConfig())
    many = ("{}," * 100_001)[:-1]
    sent = f'{{"query":{{"text":"\u0122"}},"x":[{many}],"y":1}}'.encode(codec)
    if place == "json":
        answer = front.client.post("/search", content=sent, headers=JSON)
    else:
        name = "body" if place == "body" else "filter"
        parts = {"image": ("x.png", png()), name: (None, sent)}
        answer = front.client.post("/search", files=parts)
    assert refusal(answer, 400)["message"] == "the body is not JSON in UTF-8"


@pytest.mark.parametrize("text", ["\u0122 \U0001f600", "\ufeff"])
def test_any_character_is_taken_in_utf8(front: Front, text: str) -> None:
    body = json.dumps({"query": {"text": text}}, ensure_ascii=False).encode()
    assert front.client.post("/search", content=body, headers=JSON).status_code == 200


def test_texts_may_hold_as_many_marks_as_they_like(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front.ingress, "settings", ServeConfig())
    text = '[{,"\\' * 19_000
    body = {"input": [text, text]}
    assert front.client.post("/v1/embeddings", json=body).status_code == 200


def test_half_a_character_is_answered_as_a_question_mark(front: Front) -> None:
    body = '{"query": "\\ud800x", "documents": ["\\udfff\\ud83d\\ude00"], "return_documents": true}'
    answer = front.client.post("/v1/rerank", content=body, headers=JSON)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    assert result["document"]["text"] == "?😀"
    body = '{"input": "a", "model": "\\ud800", "user": "\\ud800"}'
    answer = front.client.post("/v1/embeddings", content=body, headers=JSON)
    assert "no model '?'" in refusal(answer, 404)["message"]


# ---- limits that hold before work is done ----


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/search", {"query": {"text": "x"}, "top_k": 21}, "at most 20"),
        ("/search", {"query": {"text": "x"}, "top_k": 10**30}, "at most 20"),
        ("/search", {"query": {"text": "x"}, "rerank_k": 7}, "at most 6"),
        ("/search", {"query": {"text": "x" * 100_001}}, "at most 100000"),
        ("/search", {"query": {"embedding": [0.5] * (DIMENSION + 1)}}, "this index has 4"),
        ("/v1/embeddings", {"input": ["x"] * 9}, "at most 8"),
        ("/v1/embeddings", {"input": ["x", "y" * 100_001]}, "at most 100000"),
        ("/v1/rerank", {"query": "x", "documents": ["y"] * 7}, "at most 6"),
        ("/v1/rerank", {"query": "x" * 100_001, "documents": ["y"]}, "at most 100000"),
    ],
)
def test_a_limit_is_told_and_the_model_is_not_asked(
    front: Front, path: str, body: dict[str, Any], message: str
) -> None:
    assert message in refusal(front.client.post(path, json=body), 400)["message"]
    assert front.backbone.tenants == []


def test_a_document_that_is_too_long_is_a_problem_of_its_own(front: Front) -> None:
    body = {"query": "x", "documents": ["y", "z" * 100_001]}
    found = front.client.post("/v1/rerank", json=body).json()["results"]
    assert "at most 100000" in found[-1]["problem"]


@pytest.mark.parametrize(
    "item_id",
    [
        *("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd"),
        *(
            "....//....//etc/passwd",
            "..\\..\\etc\\passwd",
            "..%5c..%5cetc%5cpasswd",
            "%252e%252e%252fetc",
        ),
        *(
            "item-0%00.png",
            "item-0%0a",
            "file:%2f%2f%2fetc%2fpasswd",
            "item-0%2f..%2fitem-0",
            "~root",
            "%ff%fe",
        ),
        *(
            "item-0%2fimage%2f..%2f..%2fitem-0",
            "a" * 5000,
            "%c0%ae%c0%ae/etc/passwd",
            "item-0%20",
            ".",
            "",
        ),
    ],
)
def test_an_id_is_a_name_and_no_path(front: Front, item_id: str) -> None:
    assert front.client.get("/items/item-0/image").content == png("red")
    answer = front.client.get(f"/items/{item_id}/image")
    assert answer.status_code in (404, 307)
    assert b"root:" not in answer.content
    assert answer.content != png("red")


# ---- forms ----


def form(front: Front, path: str, parts: Any, **fields: Any) -> Any:
    return front.client.post(path, files=parts, data=fields)


def without_time(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    told.pop("timings_ms", None)
    return told


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "a cat"},
        {"text": "1"},
        {"text": "null", "top_k": "3"},
        {"top_k": "3", "mode": "fine", "rerank_k": "2", "explain": "true", "budget_ms": "60000.5"},
        {"mode": "coarse", "embedding": "[1, 2, 3, 4]"},
    ],
)
@pytest.mark.parametrize("style", ["fields", "body"])
def test_a_form_is_answered_as_the_json_that_it_stands_for(
    front: Front, fields: dict[str, str], style: str
) -> None:
    words = ("text", "mode")
    values = {k: v if k in words else json.loads(v) for k, v in fields.items()}
    query = {"image": base64.b64encode(png("blue")).decode()}
    query |= {k: values.pop(k) for k in ("text", "embedding") if k in values}
    expected = front.client.post("/search", json={"query": query, **values})
    if style == "body":
        rest = {k: v for k, v in query.items() if k != "image"}
        fields = {"body": json.dumps({"query": rest, **values})}
    found = form(front, "/search", {"image": ("x.png", png("blue"), "image/png")}, **fields)
    assert without_time(found) == without_time(expected)


def test_a_form_may_name_its_image_in_a_field(front: Front) -> None:
    data = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    found = form(front, "/search", {"image": (None, data)})
    expected = front.client.post("/search", json={"query": {"image": data}})
    assert without_time(found) == without_time(expected)
    link = form(front, "/search", {"image": (None, "https://example.com/a.png")})
    assert "image URLs are not fetched" in refusal(link, 400)["message"]


def test_several_images_are_embedded_in_their_order(front: Front) -> None:
    colors = ("red", "blue", "green")
    parts: list[Any] = [("image", (f"{c}.png", png(c), "image/png")) for c in colors]
    parts.insert(1, ("input", (None, "a cat")))
    found = form(front, "/v1/embeddings", parts, encoding_format="float", model="slq")
    images = [{"image": base64.b64encode(png(color)).decode()} for color in colors]
    inputs = [images[0], "a cat", *images[1:]]
    expected = front.client.post("/v1/embeddings", json={"input": inputs, "model": "slq"})
    assert without_time(found) == without_time(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"txt": "x"}, "txt"),
        ({"top_k": "many"}, "top_k"),
        ({"top_k": "0"}, "top_k"),
        ({"top_k": "21"}, "at most 20"),
        ({"query": "{}"}, "twice"),
        ({"body": "{"}, "must be a JSON object"),
        ({"body": "[]"}, "must be a JSON object"),
        ({"body": "[" * 50_000}, "must be a JSON object"),
        ({"body": '{"query": 1}', "text": "x"}, "query must be an object"),
        ({"body": '{"query": {"text": "y"}}', "text": "x"}, "tells 'text' twice"),
        ({"body": '{"top_k": 1}', "top_k": "2"}, "tells 'top_k' twice"),
        ({"body": '{"filter": ' + "[" * 900 + "]" * 900 + "}"}, ""),
        ({"text": ["x", "y"]}, "tells 'text' twice"),
        ({f"field{n}": "x" for n in range(70)}, "more than 64 parts"),
        ({f"field{n}": "x" for n in range(40)}, "fields are too many"),
    ],
)
def test_a_form_that_cannot_be_answered_is_a_400(
    front: Front, fields: dict[str, Any], message: str
) -> None:
    image = {"image": ("x.png", png(), "image/png")}
    assert message in refusal(form(front, "/search", image, **fields), 400)["message"]
    assert front.backbone.tenants == []


def test_a_form_that_is_cut_off_is_refused_at_every_place(front: Front) -> None:
    """Else half a picture, or a query without its text, would be answered as if it were meant."""
    request = front.client.build_request(
        "POST", "/search", files={"image": ("x.png", png())}, data={"text": "a cat"}
    )
    body, kind = request.read(), request.headers["content-type"]
    end = len(body.rstrip())
    for length in [*range(0, end, 7), *range(end - 8, end)]:
        answer = front.client.post("/search", content=body[:length], headers={"content-type": kind})
        assert refusal(answer, 400)
    whole = front.client.post("/search", content=body[:end], headers={"content-type": kind})
    assert whole.status_code == 200


def test_files_have_one_name_only(front: Front) -> None:
    answer = form(front, "/search", {"text": ("x.txt", b"a cat")})
    assert "text must be a text in UTF-8 and no file" in refusal(answer, 400)["message"]
    two = [("image", ("a.png", png())), ("image", ("b.png", png()))]
    assert "twice" in refusal(form(front, "/search", two), 400)["message"]
    many = [("image", ("a.png", png()))] * 65
    assert "more than 64 parts" in refusal(form(front, "/v1/embeddings", many), 400)["message"]
    large = form(front, "/search", {"image": ("x.png", b"x" * MAX_BYTES)})
    assert refusal(large, 413)
    html = form(front, "/search", {"image": ("x.png", b"<html>", "image/png")})
    assert "none of JPEG, PNG, WEBP" in refusal(html, 400)["message"]


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 1000,
        "multipart/form-data; boundary=\xff",
        "multipart/form-data; boundary=b; charset=utf-7",
        "multipart/form-data; boundary=b; charset=\x00",
        "MULTIPART/FORM-DATA; boundary=b",
        "multipart/form-data; boundary*=utf-8''b",
        "multipart/mixed; boundary=b",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/xml",
        "",
        ";;;",
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n\r\n\r\n--b--",
        b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\ncontent-disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n',
        b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n\x89PNG',
        b"--b\r\n" + b"x-y: z\r\n" * 5000 + b"\r\nx\r\n--b--\r\n",
        b"\r\n" * 10_000 + b"--b--",
        b"--c\r\n" * 10_000,
    ],
)
@pytest.mark.parametrize("path", ["/search", "/v1/embeddings", "/v1/rerank"])
def test_no_form_however_broken_is_a_500(front: Front, kind: str, body: bytes, path: str) -> None:
    headers = [(b"content-type", kind.encode("latin-1"))]
    assert refusal(front.client.post(path, content=body, headers=headers), 400)


# ---- bombs ----


@pytest.mark.parametrize(
    "size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (10**6, 10), (7072, 7072)]
)
@pytest.mark.parametrize("way", ["uri", "form", "embeddings", "documents"])
def test_a_decompression_bomb_is_refused_from_its_header(
    front: Front, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], way: str
) -> None:
    def load(_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(PngImageFile, "load", load)
    data = bomb(*size)
    text = base64.b64encode(data).decode()
    tracemalloc.start()
    if way == "form":
        answer = form(front, "/search", {"image": ("x.png", data, "image/png")})
    elif way == "uri":
        answer = front.client.post(
            "/search", json={"query": {"image": f"data:image/png;base64,{text}"}}
        )
    elif way == "embeddings":
        answer = front.client.post("/v1/embeddings", json={"input": ["a", {"image": text}]})
    else:
        body = {"query": "x", "documents": [{"image": text}]}
        answer = front.client.post("/v1/rerank", json=body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    told = (
        answer.json()["results"][0]["problem"]
        if way == "documents"
        else refusal(answer, 400)["message"]
    )
    assert any(word in told for word in ("pixels", "longer side"))


def test_many_small_files_do_not_become_many_large_images(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0

    def counted(data: bytes) -> Any:
        nonlocal decoded
        decoded += 1
        return decode_image(data)

    monkeypatch.setattr("pipelines.contents.decode_image", counted)
    monkeypatch.setattr(front.ingress, "settings", ServeConfig(max_pixels=1_000_000, max_inputs=8))
    image = base64.b64encode(png(size=(700, 700))).decode()
    body = {"input": [{"image": image}] * 8}
    answer = front.client.post("/v1/embeddings", json=body)
    assert "more than 1000000 pixels together" in refusal(answer, 400)["message"]
    assert decoded == 3


def test_what_clients_send_cannot_forge_lines_of_the_log(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    evil = "x%0a2030-01-01 ERROR forged"
    front.client.get(f"/items/{evil}/image", headers={"x-request-id": "a b"})
    front.client.get(f"/{evil}")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("pipelines", "slq"))]
    assert not [line for line in ours if "\n" in line]


def test_an_image_is_kept_by_no_cache_that_others_are_answered_from(front: Front) -> None:
    answer = front.client.get("/items/item-0/image")
    assert answer.headers["cache-control"] == "private, max-age=3600"
    assert answer.headers["vary"] == "authorization, x-api-key"
