"""Images by URL: only the public internet is asked, whatever spelling, name, redirect or answer tries otherwise."""

import asyncio
import base64
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL.PngImagePlugin import PngImageFile

from pipelines.addresses import is_public
from pipelines.contents import Content, FetchedContent
from pipelines.links import Links
from pipelines.serving.config import LinksConfig
from slq.errors import DataError, MediaError
from slq.media import decode_image
from tests.unit.front import Front, bomb, png, refusal

PUBLIC = "93.184.216.34"


Answer = Callable[[BaseHTTPRequestHandler], None]


class Canary(ThreadingHTTPServer):
    """A server on this machine that counts who comes by, and answers as a test says."""

    daemon_threads = True

    def __init__(self) -> None:
        self.hits: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, Answer] = {}
        super().__init__(("127.0.0.1", 0), Visit)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""


class Visit(BaseHTTPRequestHandler):
    server: Canary

    def do_GET(self) -> None:
        self.server.hits.append(self.path)
        self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
        self.server.answers.get(self.path, gives(png()))(self)

    def log_message(self, *_: Any) -> None:
        pass


def gives(body: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(visit: BaseHTTPRequestHandler) -> None:
        visit.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            visit.send_header(name.replace("_", "-"), value)
        visit.end_headers()
        visit.wfile.write(body)

    return answer


@pytest.fixture
def canary() -> Iterator[Canary]:
    server = Canary()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Names:
    """A name server that counts; each name has its answers, one after the other, the last for ever."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        given = self.answers.get(host)
        if given is None:
            raise OSError(-2, "Name or service not known")
        return given.pop(0) if len(given) > 1 else given[0]


def settings_of(canary: Canary, **values: Any) -> LinksConfig:
    open_to = {"enabled": True, "schemes": ("https", "http"), "ports": (80, 443, canary.port)}
    return LinksConfig.model_validate({**open_to, "timeout_s": 20, **values})


def good_links(canary: Canary, names: Names | None = None, **values: Any) -> Links:
    """Links for which this machine is a public one: `good.test` is here, and so is the address 127.0.0.1."""
    names = names or Names(good_test=[["127.0.0.1"]])
    settings = settings_of(canary, **values)
    return Links(settings, resolve=names, is_allowed=lambda address: address == "127.0.0.1")


def fetched(links: Links, url: str) -> bytes:
    return asyncio.run(links.fetch(url))


def failure(links: Links, url: str) -> MediaError:
    with pytest.raises(MediaError) as error:
        fetched(links, url)
    return error.value


# ---- which addresses ----


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1"),
        *("172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200"),
        *("192.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
        *("192.88.99.1", "224.0.0.1", "224.0.1.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
        *("64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:1::1", "2001:db8::1"),
        *("fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1"),
        *("100::1", "3fff::1", "5f00::1", "2001:4860::5efe:7f00:1", "2001:4860::200:5efe:a00:1"),
        *("", "localhost", "127.1", "0x7f000001", "2130706433", "example.com"),
    ],
)
def test_an_address_that_is_not_public_is_known_as_such(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        PUBLIC,
        "2606:4700:4700::1111",
        "2a00:1450:4001::200e",
        "64:ff9b::101:101",
        "::ffff:1.1.1.1",
    ],
)
def test_a_public_address_is_known_as_such(address: str) -> None:
    assert is_public(address)


# ---- attacks: none of them reaches the canary ----

HOSTS = [
    *("127.0.0.1", "127.0.0.2", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1"),
    *("017700000001", "0177.0.0.1", "0177.0.0.01", "127.0.0.01", "00000177.0.0.1", "127.0.0.1."),
    *(
        "0",
        "0.0.0.0",
        "0x0",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "a.localhost",
        "ip6-localhost",
    ),
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]"),
    *("[fc00::1]", "[::1", "::1", "[127.0.0.1]", "[v1.a]", "10.0.0.1", "172.16.0.1", "192.168.0.1"),
    *("100.64.0.1", "169.254.169.254", "metadata.google.internal", "metadata", "printer.local"),
    *(
        "127%2e0%2e0%2e1",
        "127。0。0。1",
        "①②⑦.⓪.⓪.①",
        "\uff11\uff12\uff17.0.0.1",
        "loc\u00adalhost",
        "ⓛocalhost",
    ),
    *("private.test", "mixed.test", "mapped.test", "loop6.test", "absent.test", "zero.test"),
    *("good.test@127.0.0.1", "good.test:80@127.0.0.1", "127.0.0.1@good.test", "@127.0.0.1"),
    *(
        "127.0.0.1#@good.test",
        "127.0.0.1?@good.test",
        "127.0.0.1/@good.test",
        "127.0.0.1\\@good.test",
    ),
    *("good.test\\@127.0.0.1", "127.0.0.1%23@good.test", "127.0.0.1%00.good.test", "", "."),
    *("127.0.0.1:{port}#.good.test", "good.test\t@127.0.0.1", "good.test\n.127.0.0.1", "-", "a..b"),
]
PRIVATE_NAMES = {
    "private_test": [["127.0.0.1"]],
    "mixed_test": [[PUBLIC, "127.0.0.1"]],
    "mapped_test": [["::ffff:127.0.0.1"]],
    "loop6_test": [["::1"]],
    "zero_test": [["0.0.0.0"]],
    "good_test": [["127.0.0.1"]],  # good only by its name
}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", HOSTS)
def test_no_spelling_of_a_private_place_is_asked(canary: Canary, scheme: str, host: str) -> None:
    links = Links(settings_of(canary), resolve=Names(**PRIVATE_NAMES))
    name = host.format(port=canary.port)
    url = f"{scheme}://{name}:{canary.port}/a.png" if name == host else f"{scheme}://{name}"
    assert failure(links, url).reason in ("url_refused", "url_failed")
    assert canary.hits == []


@pytest.mark.parametrize(
    "url",
    [
        *(
            "file:///etc/passwd",
            "file://127.0.0.1/etc/passwd",
            "gopher://127.0.0.1:{port}/_GET",
            "ftp://127.0.0.1/",
        ),
        *(
            "dict://127.0.0.1:{port}/",
            "jar:http://127.0.0.1!/",
            "//127.0.0.1:{port}/",
            "/etc/passwd",
            "http:",
            "http://",
        ),
        *(
            "http:/127.0.0.1:{port}/",
            "http:127.0.0.1:{port}/",
            "HTTP://127.0.0.1:{port}/",
            " http://127.0.0.1:{port}/",
        ),
        *(
            "http://127.0.0.1:{port}/\r\nhost: x",
            "http://good.test:{port}/a b",
            "unix:///run/x.sock",
            "data:,x",
        ),
        *(
            "javascript:alert(1)",
            "http+unix://%2Frun%2Fx/",
            "http://good.test:99999/",
            "http://good.test:-1/",
        ),
        *(
            "http://good.test:²/",
            "http://good.test:22/",
            "http://good.test:6379/",
            "http://" + "a" * 3000 + ".test/",
        ),
    ],
)
def test_no_other_scheme_port_or_form_is_asked(canary: Canary, url: str) -> None:
    links = Links(settings_of(canary), resolve=Names(**PRIVATE_NAMES))
    failure(links, url.format(port=canary.port))
    assert canary.hits == []


def test_plain_http_is_refused_unless_it_is_allowed(canary: Canary) -> None:
    links = good_links(canary, schemes=("https",))
    error = failure(links, f"http://good.test:{canary.port}/a.png")
    assert (error.reason, "its scheme must be https" in str(error)) == ("url_refused", True)
    assert canary.hits == []


def test_a_name_is_looked_up_once_so_it_cannot_change_its_mind(canary: Canary) -> None:
    """Public when it is checked, private when it is connected to: there is no second lookup."""
    names = Names(rebound_test=[["127.0.0.9"], ["127.0.0.1"]])  # nothing listens at the first
    links = Links(settings_of(canary), resolve=names, is_allowed=lambda one: one == "127.0.0.9")
    failure(links, f"http://rebound.test:{canary.port}/a.png")
    assert names.asked == ["rebound.test"]
    assert canary.hits == []


@pytest.mark.parametrize(
    "target",
    [
        *("http://127.0.0.2:{port}/x", "http://private.test:{port}/x", "http://[::1]:{port}/x"),
        *(
            "file:///etc/passwd",
            "//127.0.0.2:{port}/x",
            "http://a@good.test:{port}/x",
            "gopher://good.test/x",
        ),
        *("http://localhost:{port}/x", "http://2130706434:{port}/x", "http://good.test:22/x"),
        *("data:image/png;base64,AAAA", "http://169.254.169.254/latest/meta-data/", "\u00e9"),
    ],
)
def test_a_redirect_is_checked_as_if_it_had_been_sent(canary: Canary, target: str) -> None:
    names = Names(good_test=[["127.0.0.1"]], private_test=[["127.0.0.2"]])
    location = target.format(port=canary.port)
    canary.answers["/a.png"] = gives(b"", 302, location=location)
    error = failure(good_links(canary, names), f"http://good.test:{canary.port}/a.png")
    assert error.reason == "url_failed"
    assert canary.hits == ["/a.png"]


@pytest.mark.parametrize("loop", [["/a", "/a"], ["/a", "/b", "/a"]])
def test_redirects_end(canary: Canary, loop: list[str]) -> None:
    for here, there in itertools.pairwise(loop):
        canary.answers[here] = gives(b"", 301, location=there)
    assert failure(good_links(canary), f"http://good.test:{canary.port}/a").reason == "url_failed"
    assert len(canary.hits) == 4  # the URL itself and three redirects


# ---- what a server may send ----


def test_a_public_image_is_fetched_as_it_is(canary: Canary) -> None:
    canary.answers["/pic.png?size=1"] = gives(png("blue"))
    canary.answers["/moved"] = gives(b"", 307, location="/pic.png?size=1#part")
    for path in ("/pic.png?size=1", "/moved"):
        assert fetched(good_links(canary), f"http://good.test:{canary.port}{path}") == png("blue")
    sent = canary.headers[0]
    assert sent["host"] == f"good.test:{canary.port}"
    assert sent["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer", "x-forwarded-for"} & set(sent)


def test_an_address_in_a_url_needs_no_lookup(canary: Canary) -> None:
    names = Names()
    assert fetched(good_links(canary, names), f"http://127.0.0.1:{canary.port}/") == png()
    assert names.asked == []


def test_the_second_address_is_tried_where_the_first_does_not_answer(canary: Canary) -> None:
    names = Names(good_test=[["127.0.0.3", "127.0.0.1"]])
    links = Links(settings_of(canary), resolve=names, is_allowed=lambda _: True)
    assert fetched(links, f"http://good.test:{canary.port}/") == png()


def test_proxies_of_the_environment_are_not_asked(
    canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetched(good_links(canary), f"http://good.test:{canary.port}/") == png()


@pytest.mark.parametrize("tells_length", [True, False])
def test_an_image_that_is_too_large_is_cut_off(canary: Canary, *, tells_length: bool) -> None:
    sent = []

    def endless(visit: BaseHTTPRequestHandler) -> None:
        visit.send_response(200)
        if tells_length:
            visit.send_header("content-length", str(10**9))
        visit.end_headers()
        for _ in range(10_000):  # 640 MB, if anyone took them
            visit.wfile.write(b"x" * 65536)
            sent.append(65536)

    canary.answers["/big"] = endless
    error = failure(good_links(canary, max_bytes=10**6), f"http://good.test:{canary.port}/big")
    assert (error.reason, "1000000" in str(error)) == ("too_many_bytes", True)
    assert sum(sent) < 100 * 10**6


def test_a_server_that_drips_is_cut_off(canary: Canary) -> None:
    gone = threading.Event()

    def drip(visit: BaseHTTPRequestHandler) -> None:
        visit.send_response(200)
        visit.end_headers()
        while True:
            try:
                visit.wfile.write(b"x")
            except OSError:
                gone.set()
                return
            time.sleep(0.05)

    canary.answers["/slow"] = drip
    links = good_links(canary, timeout_s=0.5)
    assert failure(links, f"http://good.test:{canary.port}/slow").reason == "url_failed"
    assert gone.wait(30)


def test_a_name_server_that_never_answers_is_not_waited_for(canary: Canary) -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(3600)
        return []

    links = Links(settings_of(canary, timeout_s=0.2), resolve=never)
    assert failure(links, "http://good.test/").reason == "url_failed"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_a_compressed_answer_is_not_unpacked(canary: Canary, encoding: str) -> None:
    canary.answers["/z"] = gives(b"\x1f\x8b" + bytes(100), content_encoding=encoding)
    assert failure(good_links(canary), f"http://good.test:{canary.port}/z").reason == "url_failed"


def lies(visit: BaseHTTPRequestHandler) -> None:
    visit.wfile.write(b"\x00\xffnot http at all\r\n\r\n")


ODD = {
    "/404": gives(b"x", 404),
    "/500": gives(b"x", 500),
    "/206": gives(b"x", 206),
    "/302": gives(b"", 302),
    "/lies": lies,
    "/short": gives(b"x", content_length="50"),
    "/length": gives(b"x", content_length="ten"),
}


def test_whatever_fails_on_the_network_is_told_in_the_same_words(canary: Canary) -> None:
    """Else the words would tell which ports are open in our network, and which names it knows."""
    canary.answers |= ODD
    links = good_links(canary)
    with_dead = settings_of(canary, ports=(80, canary.port, 1))
    dead = Links(with_dead, resolve=Names(good_test=[["127.0.0.1"]]), is_allowed=lambda _: True)
    private = Links(with_dead, resolve=Names(**PRIVATE_NAMES))
    said = {str(failure(links, f"http://good.test:{canary.port}{path}")) for path in ODD}
    said.add(str(failure(dead, "http://good.test:1/")))
    for host in ("private.test", "absent.test", "127.0.0.1", "10.1.2.3", "mixed.test"):
        for port in (1, canary.port):
            said.add(str(failure(private, f"http://{host}:{port}/")))
    assert said == {"the image's URL cannot be fetched; send the bytes as a data URI"}
    assert set(canary.hits) == set(ODD)


def test_only_hosts_that_are_listed_are_asked(canary: Canary) -> None:
    names = Names(
        good_test=[["127.0.0.1"]], a_good_test=[["127.0.0.1"]], evilgood_test=[["127.0.0.1"]]
    )
    links = good_links(canary, names, hosts=("good.test", ".good.test"))
    for host, is_asked in (
        ("good.test", True),
        ("GOOD.test", True),
        ("a.good.test", True),
        ("evilgood.test", False),
    ):
        url = f"http://{host}:{canary.port}/"
        if is_asked:
            assert fetched(links, url) == png()
        else:
            assert "not one that this service asks" in str(failure(links, url))


def test_a_certificate_of_another_name_is_refused(canary: Canary) -> None:
    assert failure(good_links(canary), f"https://good.test:{canary.port}/").reason == "url_failed"
    assert canary.hits == []


def test_urls_are_not_logged(canary: Canary, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    canary.answers["/gone?token=abc"] = gives(b"", 404)
    failure(good_links(canary), f"http://good.test:{canary.port}/gone?token=abc")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("pipelines")]
    assert len(ours) == 1
    assert "abc" not in ours[0]


# ---- contents ----


def test_links_of_a_request_are_fetched_once_and_keep_their_places(canary: Canary) -> None:
    canary.answers |= {"/red": gives(png("red")), "/blue": gives(png("blue")), **ODD}
    base = f"http://good.test:{canary.port}"
    contents = [
        Content(text="a"),
        Content(image=f"{base}/red", text="b"),
        Content(image=f"{base}/404"),
        Content(image=base64.b64encode(png("green")).decode()),
        Content(image=f"{base}/blue"),
        Content(image=f"{base}/red"),
    ]
    found = asyncio.run(good_links(canary).readable(contents))
    assert found[0] is contents[0]
    assert found[3] is contents[3]
    assert [found[n].item().image.getpixel((0, 0)) for n in (1, 3, 4, 5)] == [  # type: ignore[union-attr]
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
        (255, 0, 0),
    ]
    assert found[1].item().text == "b"
    with pytest.raises(MediaError, match="cannot be fetched"):
        found[2].item()
    assert sorted(canary.hits) == ["/404", "/blue", "/red"]


def test_too_many_links_are_refused_before_any_is_asked(canary: Canary) -> None:
    contents = [Content(image=f"http://good.test:{canary.port}/{n}") for n in range(4)]
    with pytest.raises(DataError, match="names 4 images by URL; at most 3"):
        asyncio.run(good_links(canary, max_links=3).readable(contents))
    assert canary.hits == []


def test_off_nothing_is_fetched_and_the_error_says_so(canary: Canary) -> None:
    contents = [Content(image=f"http://good.test:{canary.port}/a.png")]
    (found,) = asyncio.run(good_links(canary, enabled=False).readable(contents))
    with pytest.raises(MediaError, match="image URLs are not fetched"):
        found.item()
    assert canary.hits == []
    assert LinksConfig().enabled is False


def test_what_was_fetched_survives_the_way_to_another_process() -> None:
    import pickle

    for image in (png(), MediaError("url_failed", "gone")):
        content = FetchedContent("a text", image)
        again = pickle.loads(pickle.dumps(content))
        if isinstance(image, bytes):
            assert again.item().image.tobytes() == decode_image(image).tobytes()
        else:
            with pytest.raises(MediaError, match="gone"):
                again.item()


@pytest.fixture
def front(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> Front:
    canary.answers |= {**ODD, "/text": gives(b"<html>no image</html>")}
    front = Front(monkeypatch)
    front.ingress._links = good_links(canary)
    return front


def test_each_route_takes_an_image_by_url_as_it_takes_its_bytes(
    front: Front, canary: Canary
) -> None:
    link = f"http://good.test:{canary.port}/a.png"
    data = base64.b64encode(png()).decode()
    for path, body in (
        ("/search", lambda image: {"query": {"image": image, "text": "a"}, "top_k": 3}),
        ("/v1/embeddings", lambda image: {"input": ["a", {"image": image}]}),
        (
            "/v1/rerank",
            lambda image: {"query": {"image": image}, "documents": ["a", {"image": image}]},
        ),
    ):
        by_url, by_bytes = (front.client.post(path, json=body(image)) for image in (link, data))
        assert by_url.status_code == 200, by_url.text
        told, expected = by_url.json(), by_bytes.json()
        told.pop("timings_ms", None)
        expected.pop("timings_ms", None)
        assert told == expected


def test_a_decompression_bomb_behind_a_link_is_refused_from_its_header(
    front: Front, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Any) -> None:
        raise AssertionError("pixels were decoded")

    canary.answers["/bomb"] = gives(bomb(30_000, 30_000))
    monkeypatch.setattr(PngImageFile, "load", load)
    query = {"image": f"http://good.test:{canary.port}/bomb"}
    answer = front.client.post("/search", json={"query": query})
    assert "too many pixels" in refusal(answer, 400)["message"]


@pytest.mark.parametrize(
    ("path", "message"), [("/404", "cannot be fetched"), ("/text", "none of JPEG, PNG, WEBP")]
)
def test_a_link_without_an_image_is_a_400_and_only_a_problem_among_documents(
    front: Front, canary: Canary, path: str, message: str
) -> None:
    link = f"http://good.test:{canary.port}{path}"
    for route, body in (
        ("/search", {"query": {"image": link}}),
        ("/v1/embeddings", {"input": ["a", {"image": link}]}),
        ("/v1/rerank", {"query": {"image": link}, "documents": ["a"]}),
    ):
        assert message in refusal(front.client.post(route, json=body), 400)["message"]
    body = {"query": "a", "documents": ["b", {"image": link}], "return_documents": True}
    found = front.client.post("/v1/rerank", json=body).json()["results"]
    (problem,) = [one for one in found if one["index"] == 1]
    assert message in problem["problem"]
    assert problem["document"] == {"image": link}
    assert [one["index"] for one in found] == [0, 1]
