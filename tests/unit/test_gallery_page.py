"""The gallery page as a file: its policy lets its own script and style run, and there is nothing else to run."""

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from pipelines.serving.page import Page, policy_of


class Parts(HTMLParser):
    """What a page is made of, as an HTML parser sees it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self._open = tag
            self.inside[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.inside[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = None


@pytest.fixture(scope="module")
def page() -> Page:
    return Page.shipped()


@pytest.fixture(scope="module")
def parts(page: Page) -> Parts:
    return Parts(page.text)


def test_its_policy_names_its_script_and_style_by_their_digests(page: Page, parts: Parts) -> None:
    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    for name in ("script", "style"):
        (inside,) = parts.inside[name]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["img-src"] == "'self' data: blob:"
    assert "unsafe" not in page.policy
    assert page.response().headers["content-security-policy"] == page.policy


def test_another_script_has_another_digest() -> None:
    one, other = (policy_of(f"<script>{body}</script><style>a</style>") for body in ("1", "2"))
    assert one != other
    assert "sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s=" in one  # of "1"


def test_nothing_of_it_needs_an_exception_from_its_policy(parts: Parts) -> None:
    for tag, attributes in parts.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert not {"src", "srcset", "action", "formaction"} & attributes.keys(), tag
        if tag == "link":
            assert str(attributes["href"]).startswith("data:")
        elif "href" in attributes:
            assert not re.match(r"\w+:|//", str(attributes["href"]))


def test_its_script_never_makes_markup_of_a_text(parts: Parts) -> None:
    (script,) = parts.inside["script"]
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert way not in script
    assert "http://" not in script.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in script


def test_ids_are_its_own_and_what_is_named_is_there(parts: Parts) -> None:
    ids = Counter(attributes["id"] for _, attributes in parts.tags if "id" in attributes)
    assert max(ids.values()) == 1
    (script,) = parts.inside["script"]
    for name in re.findall(r'\bat\("([\w-]+)"\)', script):
        assert name in ids, name
