"""API keys: made once, kept as hashes, asked for, limited, revoked, and never told."""

import contextvars
import hashlib
import json
import logging
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from typer.testing import CliRunner

from jobs.cli import app as slq
from jobs.searching import KEY_VARIABLE, Question, search_url
from pipelines.recipe import Recipe
from pipelines.serve import check_before_start
from pipelines.serving import access as access_module
from pipelines.serving.access import KEYS_VARIABLE, Access, KeyRing, require_admin
from pipelines.serving.asked import Asked, answering, asked
from pipelines.serving.config import ServeConfig
from pipelines.serving.keys import ApiKey, add_key, find, parse_keys, read_keys, remove_key
from pipelines.serving.rates import Bucket, Rates
from pipelines.serving.refusal import RequestRefusedError
from slq.errors import ConfigError, StorageError
from tests.unit.front import Front, refusal


def made(path: Path, name: str = "alice", **values: Any) -> str:
    return add_key(path, lambda digest: ApiKey(name=name, sha256=digest, **values))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- the file ----


def test_a_key_is_256_random_bits_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = made(path), made(path, "bob", scopes=("search", "admin"))
    assert all(re.fullmatch(r"slq_[A-Za-z0-9_-]{43}", key) for key in (first, second))
    text = path.read_text()
    assert first not in text
    assert second not in text
    assert [entry["name"] for entry in json.loads(text)] == ["alice", "bob"]
    assert json.loads(text)[0]["sha256"] == hashlib.sha256(first.encode()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    assert {entry.name for entry in tmp_path.iterdir()} == {"keys.json", ".keys.json.lock"}


def test_keys_that_are_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=made, args=(path, f"key-{n}")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"key-{n}" for n in range(12)}


def test_every_key_is_compared_even_after_one_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    given = [made(path, f"key-{n}") for n in range(5)]
    keys, compared = read_keys(path), []
    same = access_module.find.__globals__["hmac"].compare_digest

    def watched(left: str, right: str) -> bool:
        compared.append(left)
        return bool(same(left, right))

    monkeypatch.setattr("hmac.compare_digest", watched)
    for number, key in enumerate(given):
        found = find(keys, key)
        assert found is not None
        assert found.name == f"key-{number}"
    assert len(compared) == 25
    assert find(keys, "slq_" + "x" * 43) is None
    assert len(compared) == 30


@pytest.mark.parametrize(
    "given", ["", "slq_", "x" * 47, "slq_" + "ä" * 43, "slq_" + "x" * 44, "slq_" + "x" * 10**6]
)
def test_what_has_not_the_form_of_a_key_is_none(tmp_path: Path, given: str) -> None:
    made(tmp_path / "keys.json")
    assert find(read_keys(tmp_path / "keys.json"), given) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"name": "a"}]',
        '[{"name": "a", "sha256": "secret-value"}]',
        '[{"name": "a\\nb", "sha256": "' + "0" * 64 + '"}]',
        '[{"name": "a", "sha256": "' + "0" * 64 + '", "scopes": ["root"]}]',
        '[{"name": "a", "sha256": "' + "0" * 64 + '", "scopes": []}]',
        '[{"name": "a", "sha256": "' + "0" * 64 + '", "requests_per_s": 0}]',
        '[{"name": "a", "sha256": "' + "0" * 64 + '", "expires": "2030-01-01T00:00:00"}]',
        '[{"name": "a", "sha256": "' + "0" * 64 + '", "rate": 1}]',
        '[{"name": "a", "key": "secret-value", "sha256": "' + "0" * 64 + '"}]',
    ],
)
def test_a_malformed_list_is_refused_and_its_values_are_not_told(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"the file is no list of API keys: .*slq keys add"
    ) as error:
        parse_keys(text, source="the file")
    assert "secret-value" not in str(error.value)


@pytest.mark.parametrize("what", ["name", "sha256"])
def test_two_keys_of_one_name_or_hash_are_refused(what: str) -> None:
    one = {"name": "a", "sha256": "0" * 64}
    other = {**one, **({"sha256": "1" * 64} if what == "name" else {"name": "b"})}
    with pytest.raises(ConfigError, match=f"two API keys of the same {what}"):
        parse_keys(json.dumps([one, other]), source="x")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_tenant_that_is_the_name_of_a_key_without_one_is_refused(*, is_first: bool) -> None:
    """They would share caches, which nobody asked for."""
    alone, named = (
        {"name": "a", "sha256": "0" * 64},
        {"name": "b", "sha256": "1" * 64, "tenant": "a"},
    )
    keys = [alone, named] if is_first else [named, alone]
    with pytest.raises(ConfigError, match=r"x: the tenant of API key \d is the name of API key \d"):
        parse_keys(json.dumps(keys), source="x")
    together = parse_keys(json.dumps([{**alone, "tenant": "a"}, named]), source="x")
    assert [key.owner for key in together] == ["a", "a"]
    apart = parse_keys(json.dumps([alone, {**named, "tenant": "c"}]), source="x")
    assert [key.owner for key in apart] == ["a", "c"]


def test_a_key_that_would_share_caches_by_accident_is_not_added(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made(path, "a")
    with pytest.raises(ConfigError, match="choose another tenant"):
        made(path, "b", tenant="a")
    assert [key.name for key in read_keys(path)] == ["a"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    made(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"may write to the API keys .*chmod 600"):
        read_keys(path)


def test_a_file_that_others_may_read_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    made(path)
    assert read_keys(path)
    assert not caplog.records
    path.chmod(0o644)
    assert read_keys(path)
    assert "may read the hashes" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    made(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        remove_key(path, "alice")
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"keys.json", ".keys.json.lock"}


# ---- the command ----


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(slq, ["keys", *map(str, arguments)])


def test_the_command_makes_shows_and_removes_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    added = run("add", path, "alice", "--rate", 2, "--burst", 5, "--days", 1, "--tenant", "team")
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    found = find(read_keys(path), key)
    assert found is not None
    assert (found.owner, found.requests_per_s, found.burst) == ("team", 2, 5)
    assert found.expires is not None
    assert timedelta(hours=23) < found.expires - datetime.now(UTC) < timedelta(hours=25)
    admin = run("add", path, "root", "--scope", "admin", "--scope", "search", "--json")
    assert json.loads(admin.stdout)["name"] == "root"
    shown = json.loads(run("list", path, "--json").stdout)
    assert [(one["name"], one["scopes"]) for one in shown] == [
        ("alice", ["search"]),
        ("root", ["admin", "search"]),
    ]
    everything = run("list", path).output + run("list", path, "--json").output
    assert found.sha256 not in everything
    assert "alice" in run("list", path).stdout
    assert run("remove", path, "alice").exit_code == 0
    assert [one.name for one in read_keys(path)] == ["root"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "absent.json"), "cannot be read: No such file"),
        (("remove", "keys.json", "bob"), "has no key 'bob'; it has: alice"),
        (("add", "keys.json", "alice"), "already holds a key 'alice'"),
        (("add", "keys.json", "a b"), "the key: name"),
        (("add", "keys.json", "b", "--rate", "0"), "the key: requests_per_s"),
        (("add", "absent/keys.json", "b"), "does not exist"),
        (("list", "damaged.json"), "is no list of API keys"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made(Path("keys.json"))
    Path("damaged.json").write_text("{")
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["add", "list", "remove"])
def test_each_command_explains_itself_with_an_example(command: str) -> None:
    assert re.search(rf"Example: slq\s+keys\s+{command}", run(command, "--help").stdout)


# ---- starting ----


def test_a_public_address_without_keys_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"serve": {"host": "0.0.0.0"}})
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*slq keys add.*serve\.access\.open=true"):
        check_before_start(recipe)
    made(tmp_path / "keys.json")
    for section in ({"open": True}, {"keys_file": tmp_path / "keys.json"}):
        Access(ServeConfig.model_validate({"host": "0.0.0.0", "access": section}))


def test_required_keys_are_required_on_a_loopback_address_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ServeConfig.model_validate({"access": {"required": True}})
    with pytest.raises(ConfigError, match=r"serve\.access\.required is set"):
        Access(settings)
    monkeypatch.setenv(KEYS_VARIABLE, "[]")
    Access(settings)


def test_keys_come_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    settings = ServeConfig.model_validate({"access": {"keys_file": path}})
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(settings)
    made(path)
    monkeypatch.setenv(KEYS_VARIABLE, path.read_text())
    with pytest.raises(ConfigError, match="leave one of them out"):
        Access(settings)


def test_keys_of_the_environment_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = made(tmp_path / "keys.json")
    monkeypatch.setenv(KEYS_VARIABLE, (tmp_path / "keys.json").read_text())
    front = Front(monkeypatch)
    assert front.client.get("/info").status_code == 401
    assert front.client.get("/info", headers=bearer(key)).status_code == 200


def test_a_service_whose_last_key_was_removed_lets_nobody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "keys.json")
    remove_key(tmp_path / "keys.json", "alice")
    front = Front(monkeypatch, access={"keys_file": str(tmp_path / "keys.json")})
    assert front.client.get("/info").status_code == 401


# ---- asking ----

SEARCH_BODY = {"query": {"text": "a cat"}}
ROUTES = [
    ("POST", "/search", "search"),
    ("POST", "/v1/embeddings", "search"),
    ("POST", "/v1/rerank", "search"),
    ("GET", "/v1/models", "search"),
    ("GET", "/info", "search"),
    ("GET", "/items/item-0/image", "search"),
    ("GET", "/anything/else", "search"),
    ("POST", "/admin/index", "admin"),
    ("POST", "/admin/anything", "admin"),
    ("GET", "/healthz", None),
    ("GET", "/readyz", None),
    ("GET", "/", None),
    ("GET", "/docs", None),
    ("GET", "/redoc", None),
    ("GET", "/openapi.json", None),
    ("GET", "/metrics", None),
]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
@pytest.mark.parametrize("style", ["bearer", "header"])
def test_each_route_asks_for_its_scope(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    scope: str | None,
    style: str,
) -> None:
    file = tmp_path / "keys.json"
    keys = {name: made(file, name, scopes=(name,)) for name in ("search", "admin")}
    client = Front(monkeypatch, host="0.0.0.0", access={"keys_file": str(file)}).client

    def ask(key: str | None) -> Any:
        headers = {} if key is None else {"x-api-key": key} if style == "header" else bearer(key)
        return client.request(method, path, headers=headers)

    for key in (None, "slq_" + "x" * 43, "unused", keys["search"][:-1]):
        answer = ask(key)
        if scope is None:
            assert answer.status_code in (200, 404)
            continue
        error = refusal(answer, 401)
        assert error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    for name, key in keys.items():
        if scope is None or scope == name:
            assert ask(key).status_code not in (401, 403)
        else:
            assert refusal(ask(key), 403)["type"] == "permission_error"


@pytest.mark.parametrize(
    "path", ["/metrics", "/docs", "/openapi.json", "/redoc", "/docs/oauth2-redirect"]
)
@pytest.mark.parametrize(
    ("switch", "without", "with_key"), [("open", 200, 200), ("key", 401, 200), ("off", 404, 404)]
)
def test_what_describes_the_service_can_be_switched(
    tmp_path: Path, path: str, switch: str, without: int, with_key: int
) -> None:
    file = tmp_path / "keys.json"
    key = made(file, scopes=("admin",))
    section = {"keys_file": file, "metrics": switch, "docs": switch}
    access = Access(ServeConfig.model_validate({"access": section}))
    for headers, status in (({}, without), (bearer(key), with_key)):
        if status == 200:
            access.admit(path, Headers(headers), "id")
            continue
        with pytest.raises(RequestRefusedError) as error:
            access.admit(path, Headers(headers), "id")
        assert error.value.status == status


def test_an_expired_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = tmp_path / "keys.json", datetime.now(UTC)
    old = made(file, "old", expires=now - timedelta(seconds=1))
    new = made(file, "new", expires=now + timedelta(days=1))
    client = Front(monkeypatch, access={"keys_file": str(file)}).client
    assert "expired" in refusal(client.get("/info", headers=bearer(old)), 401)["message"]
    assert client.get("/info", headers=bearer(new)).status_code == 200


def test_versions_are_changed_with_an_admin_key_on_any_host_unless_nobody_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    key = made(file, scopes=("admin", "search"))
    for admin, status in ((None, 200), (True, 200), (False, 403)):
        section = {"host": "0.0.0.0", "admin": admin, "access": {"keys_file": str(file)}}
        client = Front(monkeypatch, **section).client
        answer = client.post("/admin/index", json={"version": "current"}, headers=bearer(key))
        assert answer.status_code == status
        reason = client.get("/info", headers=bearer(key)).json()["refused_reason"]
        assert (reason is None) is (status == 403)
    for host, status in (("127.0.0.1", 200), ("0.0.0.0", 403)):
        client = Front(monkeypatch, host=host, access={"open": True}).client
        answer = client.post("/admin/index", json={"version": "current"})
        assert answer.status_code == status
        assert (client.get("/info").json()["refused_reason"] is None) is (status == 403)


def test_what_is_kept_is_kept_apart_by_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    keys = [made(file, "alice"), made(file, "bob", tenant="team"), made(file, "eve", tenant="team")]
    front = Front(monkeypatch, access={"keys_file": str(file)})
    for key in keys:
        answer = front.client.post("/search", json=SEARCH_BODY, headers=bearer(key))
        assert answer.status_code == 200
    assert front.backbone.tenants == ["alice", "team", "team"]


def test_websockets_do_not_get_past_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.websockets import WebSocketDisconnect

    client = Front(monkeypatch).client
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/search"):
        pass


# ---- changes while it runs ----


def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    alice = made(path)
    ring = KeyRing(read_keys(path), path, clock)
    assert ring.now() is ring.now()
    bob = made(path, "bob")
    clock.now += 5
    assert find(ring.now(), bob) is not None
    remove_key(path, "alice")
    clock.now += 5
    assert find(ring.now(), alice) is None
    assert find(ring.now(), bob) is not None


@pytest.mark.parametrize("harm", ["damaged", "gone", "writable"])
def test_a_file_that_breaks_changes_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    alice = made(path)
    ring = KeyRing(read_keys(path), path, clock)
    ring.now()
    if harm == "gone":
        path.unlink()
    elif harm == "damaged":
        path.write_text('[{"name": "mallory", "sha256": "slq_secret"}]')
    else:
        made(path, "mallory")
        path.chmod(0o666)
    for _ in range(4):
        clock.now += 5
        assert [key.name for key in ring.now()] == ["alice"]
    assert find(ring.now(), alice) is not None
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "API keys stay as they were" in told[0]
    assert "slq_secret" not in told[0]


# ---- rates ----


def test_a_bucket_lets_as_many_in_as_a_count_by_hand() -> None:
    clock = Clock()
    bucket = Bucket(per_s=2, size=3, clock=clock)
    assert [bucket.enter() for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.25
    assert bucket.enter() == 0.25
    clock.now += 0.25
    assert [bucket.enter(), bucket.enter()] == [0, 0.5]
    clock.now += 1000
    assert [bucket.enter() for _ in range(4)] == [0, 0, 0, 0.5]


def test_in_the_long_run_no_more_than_the_rate_comes_in() -> None:
    clock = Clock()
    bucket = Bucket(per_s=5, size=10, clock=clock)
    let_in = 0
    for _ in range(10_000):
        clock.now += 0.01
        let_in += bucket.enter() == 0
    assert 500 <= let_in <= 511


def test_large_requests_are_paid_for_afterwards() -> None:
    clock = Clock()
    bucket = Bucket(per_s=1, size=2, clock=clock)
    assert bucket.enter() == 0
    bucket.take(9)
    assert bucket.enter() == 9
    clock.now += 9
    assert bucket.enter() == 0


def test_replicas_share_a_rate_and_a_changed_key_begins_anew(tmp_path: Path) -> None:
    clock = Clock()
    rates = Rates(4, clock)
    key = ApiKey(name="a", sha256="0" * 64, requests_per_s=8, burst=20)
    assert [rates.enter(key) for _ in range(6)] == [0] * 5 + [0.5]
    faster = key.model_copy(update={"requests_per_s": 80})
    rates.keep_only([faster])
    assert rates.enter(faster) == 0
    assert rates.enter(ApiKey(name="b", sha256="1" * 64)) == 0


def test_a_key_that_asks_too_much_is_told_when_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    slow, free = made(file, "slow", requests_per_s=0.001, burst=2), made(file, "free")
    front = Front(monkeypatch, access={"keys_file": str(file)})

    def ask(key: str, path: str, **body: Any) -> Any:
        return front.client.post(path, json=body, headers=bearer(key))

    assert ask(slow, "/search", **SEARCH_BODY).status_code == 200
    # ten inputs count as ten requests, though only one was left
    assert ask(slow, "/v1/embeddings", input=["a"] * 10).status_code == 200
    answer = ask(slow, "/search", **SEARCH_BODY)
    assert refusal(answer, 429)["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) == pytest.approx(10_000, abs=60)
    assert front.client.get("/healthz", headers=bearer(slow)).status_code == 200
    for _ in range(20):
        assert ask(free, "/search", **SEARCH_BODY).status_code == 200


def test_documents_count_as_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    key = made(file, requests_per_s=0.001, burst=5)
    client = Front(monkeypatch, access={"keys_file": str(file)}).client
    body = {"query": "x", "documents": ["y"] * 5}
    assert client.post("/v1/rerank", json=body, headers=bearer(key)).status_code == 200
    assert refusal(client.post("/v1/rerank", json=body, headers=bearer(key)), 429)


# ---- secrecy ----


def test_the_search_command_sends_the_key_that_the_environment_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"results": []}')

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        search_url(url, Question("a cat"), top_k=1, mode="auto")
        monkeypatch.setenv(KEY_VARIABLE, "slq_key")
        search_url(url, Question("a cat"), top_k=1, mode="auto")
        server.shutdown()
        thread.join()
    assert seen == [None, "Bearer slq_key"]


def test_a_key_is_in_no_log_no_error_and_no_info(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys.json"
    key, wrong = made(file, scopes=("search", "admin")), "slq_" + "W" * 43
    client = Front(monkeypatch, access={"keys_file": str(file)}).client
    told = []
    for sent in (key, wrong):
        for headers in (bearer(sent), {"x-api-key": sent}, {"authorization": f"Basic {sent}"}):
            for method, path in (("GET", "/info"), ("POST", "/search"), ("GET", "/absent")):
                told.append(client.request(method, path, headers=headers))
        told.append(client.get(f"/info?api_key={sent}&access_token={sent}"))
        told.append(client.get(f"/absent?api_key={sent}", headers=bearer(key)))
    assert {answer.status_code for answer in told} == {200, 400, 401, 404}
    said = "".join(f"{answer.text} {answer.headers}" for answer in told)
    logged = "".join(
        r.getMessage() for r in caplog.records if r.name.startswith(("slq", "pipelines"))
    )
    for secret in (key, wrong, read_keys(file)[0].sha256):
        assert secret not in said
        assert secret not in logged


def test_outside_of_any_request_nothing_may_be_done() -> None:
    found = contextvars.Context().run(asked)
    assert (found.scopes, found.client) == (frozenset(), "")
    with pytest.raises(RequestRefusedError, match="needs the scope 'admin'"):
        contextvars.Context().run(require_admin)
    with pytest.raises(RequestRefusedError, match="needs the scope 'admin'"):
        contextvars.Context().run(_require_after, Asked(request_id="r-1"))


def _require_after(request: Asked) -> None:
    answering(request)
    require_admin()
