"""The gallery in a real browser against the real service; every refusal and every failure is seen as a user sees it."""

import asyncio
import base64
import io
import json
import math
import re
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from jobs.searching import Question, hits_table, search_url
from pipelines.embed import embed
from pipelines.index import index
from pipelines.loading import encoder_of, reranker_of, scoring_backbone
from pipelines.recipe import Recipe
from pipelines.serve import start, stop
from pipelines.serving.candidates import Stored
from pipelines.serving.pinned import Pinned
from pipelines.serving.replicas import BackboneService
from slq.arrow import ITEMS
from slq.artifacts import load_adapter
from slq.errors import DataError
from slq.index import VectorIndex
from slq.latent_queries import LatentQueries
from slq.media import decode_image
from slq.reranking.heat import answer_heat, latent_heat
from slq.schema import Item
from tests.browser import chromium, launched, searched
from tests.integration.runs import changed, free_port, with_untrained_adapter

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium (or Chrome) on the PATH"),
]
QUERY = "a red apple left of two dogs"
DEPTH, TOP_K = 8, 10
TEXT_ONLY, HOSTILE_ID = "only-a-text", '<b id="bold">x</b>&amp;"'
HOSTILE = '<img src=x onerror="window.broken = 1"><script>window.broken = 2</script>'
CARD = ".card[data-id]"


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The gallery with a text alone, and an item whose id and text would be markup."""
    folder = tmp_path_factory.mktemp("gallery")
    rows = pq.read_table(scenes_dir / "gallery.parquet").to_pylist()
    rows[0] |= {"id": HOSTILE_ID, "text": HOSTILE}
    rows.append({"id": TEXT_ONLY, "image": None, "text": QUERY})
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEMS), folder / "corpus.parquet")
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir, "corpus": str(folder / "corpus.parquet")},
        adapter={"num_latents": 4},
        embed={"shard_rows": 40},
        rerank={"depth": DEPTH},
        serve={"port": free_port(), "max_top_k": 20, "num_threads": 1},
        storage={"dir": folder / "run"},
    )
    recipe = with_untrained_adapter(recipe)
    embed(recipe)
    index(recipe)
    return recipe


@pytest.fixture(scope="module")
def service(recipe: Recipe) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=start(recipe), timeout=60) as client:
        yield client
    stop()


@pytest.fixture(scope="module")
def corpus(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(recipe.data.path("corpus")).to_pylist()}


@pytest.fixture(scope="module")
def browser(service: httpx.Client) -> Iterator[Browser]:
    with launched() as found:
        yield found


class Watched:
    """What a page asked for and complained of.

    Attributes:
        excused: Complaints that a test brings about.
    """

    def __init__(self, page: Page) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.excused = "^$"
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                self.complaints.append(said.text) if said.type in ("error", "warning") else None
            ),
        )

    def require_quiet(self, origin: str) -> None:
        foreign = [url for url in self.asked if not url.startswith((origin, "data:", "blob:"))]
        assert foreign == []
        assert [said for said in self.complaints if not re.search(self.excused, said)] == []


@pytest.fixture
def opened(browser: Browser, service: httpx.Client) -> Iterator[tuple[Page, Watched]]:
    """The gallery, opened; when a test is over, nothing was asked of elsewhere and nothing went wrong unseen."""
    origin = str(service.base_url)
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=origin)
    context.set_default_timeout(30_000)
    page = context.new_page()
    watched = Watched(page)
    page.goto("/")
    yield page, watched
    context.close()
    watched.require_quiet(origin)


@pytest.fixture
def page(opened: tuple[Page, Watched]) -> Page:
    return opened[0]


@pytest.fixture
def watched(opened: tuple[Page, Watched]) -> Watched:
    return opened[1]


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Search text")


def order(page: Page, name: str) -> list[str]:
    """Ids of a column from top to bottom."""
    cards = page.get_by_role("region", name=name).locator(CARD)
    expect(cards.first).to_be_visible()
    return [str(one.get_attribute("data-id")) for one in cards.all()]


def answered(page: Page) -> Any:
    """Waits for the answer to a search that is begun in the block."""
    return page.expect_response(lambda response: response.url.endswith("/search"))


def sent(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = response.request.post_data_json
    return found


def picture_file(corpus: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return {"name": f"{name}.png", "mimeType": "image/png", "buffer": corpus[name]["image"]}


def give_file(page: Page, event: str, corpus: dict[str, dict[str, Any]], name: str) -> None:
    """A paste or a drop of a file, as the browser would tell of it."""
    data = base64.b64encode(corpus[name]["image"]).decode()
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [data, f"{name}.png"],
    )
    if event == "paste":
        page.evaluate(
            "(clipboardData) => document.activeElement.dispatchEvent("
            "new ClipboardEvent('paste', { clipboardData, bubbles: true, cancelable: true }))",
            transfer,
        )
        return
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop an image to search by it")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop an image to search by it")).to_be_hidden()


def require_image_query(
    page: Page, response: Any, corpus: dict[str, dict[str, Any]], name: str
) -> None:
    """The very image was asked for, found, and is shown beside the text."""
    data = sent(response)["query"]["image"].partition(",")[2]
    assert base64.b64decode(data) == corpus[name]["image"]
    assert order(page, "Coarse order")[0] == name
    chip = page.get_by_role("group", name="Query image")
    expect(chip).to_contain_text(f"{name}.png")
    assert chip.get_by_role("img").evaluate("(image) => image.naturalWidth") > 0


# ---- what is behind it, over HTTP ----


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_items_like_one_are_its_neighbours_in_the_index(
    service: httpx.Client, recipe: Recipe
) -> None:
    body = {"query": {"like": "test-00003"}, "top_k": 10, "mode": "coarse"}
    found = service.post("/search", json=body).json()
    expected = VectorIndex(recipe.storage.index).more_like("test-00003", 10)
    assert [one["id"] for one in found["results"]] == [hit.id for hit in expected]
    scores = [one["score"] for one in found["results"]]
    assert scores == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert found["reranked"] == 0


def test_the_command_line_asks_a_service_for_items_like_one(
    service: httpx.Client, recipe: Recipe
) -> None:
    question = Question(like="test-00003")
    found = search_url(str(service.base_url), question, top_k=3, mode="coarse")
    expected = VectorIndex(recipe.storage.index).more_like("test-00003", 3)
    assert [one["id"] for one in found["results"]] == [hit.id for hit in expected]
    assert [column.header for column in hits_table(found).columns][-1] == "fine"


def test_the_fine_stage_reads_the_item_that_others_are_like(
    service: httpx.Client, recipe: Recipe, corpus: dict[str, dict[str, Any]]
) -> None:
    reranker = reranker_of(recipe, scoring_backbone(recipe, encoder_of(recipe)))
    for name in ("test-00003", TEXT_ONLY, HOSTILE_ID):
        body = {"query": {"like": name}, "top_k": 3, "rerank_k": 3, "mode": "fine"}
        found = service.post("/search", json=body).json()
        assert (found["reranked"], found["degraded"]) == (3, False)
        query, *items = [
            Item(
                text=corpus[n]["text"],
                image=decode_image(corpus[n]["image"]) if corpus[n]["image"] else None,
            )
            for n in (name, *(one["id"] for one in found["results"]))
        ]
        expected = reranker.score([(query, item) for item in items]).tolist()
        assert [one["fine_score"] for one in found["results"]] == pytest.approx(expected, abs=1e-3)
        assert [one["modality"] for one in found["results"]] == [one.modality for one in items]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"like": "absent"}, "the index holds no item 'absent'"),
        ({"like": ""}, "the index holds no item ''"),
        ({"like": "test-00003", "text": "x"}, "leave out text"),
        (
            {"like": "test-00003", "image": "aGk=", "embedding": [1]},
            "leave out image and embedding",
        ),
        ({"like": 3}, "query.like"),
    ],
)
def test_a_wrong_query_for_items_like_one_is_a_400(
    service: httpx.Client, query: dict[str, Any], message: str
) -> None:
    assert message in refusal(service.post("/search", json={"query": query}), 400)


def test_a_heat_map_is_that_of_the_core(
    service: httpx.Client, recipe: Recipe, corpus: dict[str, dict[str, Any]]
) -> None:
    encoder = encoder_of(recipe)
    reranker = reranker_of(recipe, scoring_backbone(recipe, encoder))
    item, other = (
        Item(image=decode_image(corpus[n]["image"])) for n in ("test-00003", "test-00004")
    )
    latents = load_adapter(recipe.storage.adapter, encoder.backbone)
    assert isinstance(latents, LatentQueries)
    data = base64.b64encode(corpus["test-00004"]["image"]).decode()
    for body, expected in (
        ({"query": {"text": QUERY}}, answer_heat(reranker, Item(text=QUERY), item)),
        ({"query": {"image": data}}, answer_heat(reranker, other, item)),
        ({"query": {"like": "test-00004"}, "of": "answer"}, answer_heat(reranker, other, item)),
        ({"of": "latents"}, latent_heat(encoder.backbone, latents, item)),
    ):
        found = service.post("/explain", json={"id": "test-00003", **body}).json()
        assert (found["rows"], found["columns"], found["covers"]) == (6, 6, "image")
        np.testing.assert_allclose(found["values"], expected.values.numpy(), atol=1e-5)
        assert math.fsum(map(math.fsum, found["values"])) == pytest.approx(1, abs=1e-5)
        assert found["share"] == pytest.approx(expected.share, abs=1e-5)
        assert (found["id"], found["index_version"]) == ("test-00003", "v000001")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"query": {"text": "x"}, "id": "absent"}, 404, "no item 'absent'"),
        ({"query": {"like": "gone"}, "id": "test-00003"}, 404, "no item 'gone'"),
        ({"query": {"text": "x"}, "id": TEXT_ONLY}, 400, "has no image in which"),
        ({"id": TEXT_ONLY, "of": "latents"}, 400, "has no image in which"),
        ({"id": "test-00003"}, 400, "give the query"),
        ({"id": "test-00003", "query": {}}, 400, "neither an image nor a text"),
        ({"id": "test-00003", "query": {"embedding": [1.0]}}, 400, "give the query"),
        ({"id": "test-00003", "query": {"text": "\x00"}}, 400, "empty"),
        ({"id": "test-00003", "query": {"image": "aHRtbA=="}}, 400, "none of JPEG"),
        ({"id": "test-00003", "query": {"text": "x"}, "of": "latents"}, 400, "leave out query"),
        ({"id": "test-00003", "query": {"text": "x"}, "of": "all"}, 400, "of"),
        ({"query": {"text": "x"}}, 400, "id"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_refused_with_the_reason(
    service: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    assert message in refusal(service.post("/explain", json=body), status)


def run(call: Coroutine[Any, Any, Any]) -> Any:
    """In a thread of its own: that of the tests may have a loop already, the browser's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, call).result()


def test_what_a_replica_cannot_show_or_read_is_the_asker_s_to_know(
    service: httpx.Client, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = VectorIndex(recipe.storage.index)
    pinned = Pinned(fingerprint=index.fingerprint, index_version=index.version)
    replica = BackboneService.func_or_class(recipe.model_dump(mode="json"), pinned)
    row = index.item("test-00003")
    assert row is not None
    there, gone = Stored.of_row(row), Stored("/nowhere/a.png", None, "image")
    with pytest.raises(
        DataError, match=r"others should be like cannot be scored: its image cannot"
    ):
        run(replica.rank(gone, [there]))
    with pytest.raises(DataError, match="its image cannot be read any more"):
        run(replica.heat(None, gone))
    replica._encoder.backbone.decoder.set_attn_implementation("eager")
    with pytest.raises(
        DataError, match=r"cannot show where it looks: the attention of tiny cannot"
    ):
        run(replica.heat(Item(text=QUERY), there))
    monkeypatch.setattr(replica._encoder, "adapter", None)
    with pytest.raises(DataError, match="this model embeds without latent queries"):
        run(replica.heat(None, there))


# ---- searches ----


def test_it_begins_with_what_can_be_asked(page: Page) -> None:
    expect(page.get_by_role("heading", name="Search 33 items")).to_be_visible()
    expect(box(page)).to_be_focused()
    example = page.get_by_role("group", name="Example queries").get_by_role("button").first
    text = example.inner_text()
    with answered(page) as response:
        example.click()
    assert sent(response.value)["query"] == {"text": text, "image": None}
    expect(box(page)).to_have_value(text)
    assert len(order(page, "Fine order")) == TOP_K
    expect(page.get_by_role("heading", name="Search 33 items")).to_be_hidden()


def test_both_orders_stand_side_by_side_as_the_service_gives_them(
    page: Page, service: httpx.Client
) -> None:
    body = {"query": {"text": QUERY}, "top_k": 20, "mode": "auto"}
    results = service.post("/search", json=body).json()["results"]
    with answered(page) as response:
        searched(page, QUERY)
    found = response.value.json()
    coarse = sorted(results, key=lambda one: -one["coarse_score"])
    assert order(page, "Coarse order") == [one["id"] for one in coarse[:TOP_K]]
    assert order(page, "Fine order") == [one["id"] for one in results[:TOP_K]]
    first = page.get_by_role("region", name="Fine order").get_by_role("article").first
    place = 1 + [one["id"] for one in coarse].index(results[0]["id"])
    expect(first).to_contain_text(f"up from place {place}" if place > 1 else "=")
    expect(first).to_contain_text(f"cosine {results[0]['coarse_score']:.3f}")
    shown = f"{abs(results[0]['fine_score']):.2f}"
    expect(first).to_contain_text(re.compile(rf"fine .{re.escape(shown)}"))
    status = page.get_by_role("status").first
    expect(status).to_contain_text("10 results in")
    expect(status).to_contain_text(f"{DEPTH} scored by the fine stage · index v000001")
    times = page.get_by_role("group", name="Time of each stage")
    for name, key in (
        ("embed", "embed"),
        ("coarse", "search"),
        ("read", "fetch"),
        ("fine", "fine"),
    ):
        value = found["timings_ms"][key]
        if value < 0.1:  # too little to be told
            continue
        expect(times).to_contain_text(
            f"{name} {value:.1f} ms" if value < 10 else f"{name} {value:.0f} ms"
        )
    left, right = (
        page.get_by_role("region", name=f"{n} order").bounding_box() for n in ("Coarse", "Fine")
    )
    assert left
    assert right
    assert left["x"] + left["width"] <= right["x"]


def test_of_a_coarse_search_there_is_one_order(page: Page) -> None:
    page.get_by_label("Stages").select_option("coarse only")
    page.get_by_label("Results").select_option("5")
    with answered(page) as response:
        searched(page, QUERY)
    assert (sent(response.value)["mode"], sent(response.value)["top_k"]) == ("coarse", 5)
    assert len(order(page, "Coarse order")) == 5
    expect(page.get_by_role("region", name="Fine order")).to_have_count(0)
    with answered(page) as response:
        page.get_by_label("Stages").select_option("coarse, then fine at full depth")
    assert (sent(response.value)["mode"], sent(response.value)["top_k"]) == ("fine", DEPTH)
    assert len(order(page, "Fine order")) == 5


def test_no_more_results_are_offered_than_the_service_gives(page: Page) -> None:
    expect(page.get_by_label("Results").locator("option:not([disabled])")).to_have_text(
        ["5", "10", "20"]
    )


def test_a_file_is_chosen_searched_by_and_taken_back(
    page: Page, corpus: dict[str, dict[str, Any]]
) -> None:
    with answered(page) as response, page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Image", exact=True).click()
        chooser.value.set_files(picture_file(corpus, "test-00003"))
    require_image_query(page, response.value, corpus, "test-00003")
    box(page).fill("on a red background")
    with answered(page) as response:
        page.get_by_role("button", name="Search", exact=True).click()
    query = sent(response.value)["query"]
    assert query["text"] == "on a red background"
    assert query["image"]
    page.get_by_role("button", name="Remove the image from the query").click()
    expect(page.get_by_role("group", name="Query image")).to_be_hidden()
    with answered(page) as response:
        page.keyboard.press("Enter")
    assert sent(response.value)["query"] == {"text": "on a red background", "image": None}


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(
    page: Page, corpus: dict[str, dict[str, Any]], event: str
) -> None:
    with answered(page) as response:
        give_file(page, event, corpus, "test-00005")
    require_image_query(page, response.value, corpus, "test-00005")


def test_an_image_comes_from_the_real_clipboard(
    page: Page, corpus: dict[str, dict[str, Any]]
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const image = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
        }""",
        base64.b64encode(corpus["test-00003"]["image"]).decode(),
    )
    box(page).focus()
    with answered(page) as response:
        page.keyboard.press("Control+v")
    assert sent(response.value)["query"]["image"].startswith("data:image/png;base64,")
    assert order(page, "Coarse order")[0] == "test-00003"  # the clipboard writes PNGs of its own


def test_what_is_no_image_is_told_without_asking_the_service(page: Page, watched: Watched) -> None:
    page.get_by_label("Choose an image").set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
    )
    expect(page.get_by_role("alert")).to_contain_text("That is no image. notes.txt is text/plain")
    assert not [url for url in watched.asked if url.endswith("/search")]


def test_more_like_one_is_a_search_that_can_be_gone_back_from(page: Page) -> None:
    searched(page, QUERY)
    before = order(page, "Fine order")
    name = next(one for one in before if one.startswith("test-"))
    card = page.get_by_role("region", name="Fine order").locator(f'{CARD}[data-id="{name}"]')
    with answered(page) as response:
        card.get_by_role("button", name=f"More like {name}").click()
    assert sent(response.value)["query"] == {"like": name}
    found = order(page, "Fine order")
    assert name not in found
    assert len(found) == TOP_K
    chip = page.get_by_role("group", name="Query item")
    expect(chip).to_contain_text(f"like {name}")
    expect(box(page)).to_have_value("")
    assert f"like={name}" in page.url
    with answered(page) as response:
        page.go_back()
    assert sent(response.value)["query"]["text"] == QUERY
    assert order(page, "Fine order") == before
    expect(chip).to_be_hidden()


def test_a_link_to_a_search_searches(page: Page) -> None:
    with answered(page) as response:
        page.goto(f"/?q={QUERY.replace(' ', '+')}&mode=coarse&n=5")
    assert (sent(response.value)["mode"], sent(response.value)["top_k"]) == ("coarse", 5)
    assert len(order(page, "Coarse order")) == 5


# ---- what is told of a result ----


def test_why_shows_where_the_model_looks(
    page: Page, service: httpx.Client, watched: Watched
) -> None:
    watched.excused = "willReadFrequently"  # of the test, which reads pixels
    searched(page, QUERY)
    results = service.post(
        "/search", json={"query": {"text": QUERY}, "top_k": 20, "explain": True}
    ).json()["results"]
    result = next(one for one in results if one["modality"] == "image" and one["explanation"])
    card = page.locator(f'{CARD}[data-order=fine][data-id="{result["id"]}"]')
    card.get_by_role("button", name="Why").click()
    sheet = page.get_by_role("dialog", name=result["id"])
    expect(sheet).to_be_visible()
    for choice, body in (
        ("Before it answers", {"query": {"text": QUERY}}),
        ("As it embeds", {"of": "latents"}),
    ):
        sheet.get_by_role("radio", name=choice).check()
        values = np.array(
            service.post("/explain", json={"id": result["id"], **body}).json()["values"]
        )
        row, column = np.unravel_index(values.argmax(), values.shape)
        told = f"Heat map of 6 by 6: most attention at row {row + 1}, column {column + 1}"
        expect(sheet.get_by_role("img", name=told)).to_be_visible()
        require_brightest(sheet.get_by_role("img", name=told), (row, column), (6, 6))
    expect(sheet).to_contain_text(re.compile(r"of the latent queries' attention goes to its image"))
    explanation = result["explanation"]
    expect(sheet).to_contain_text(f"{abs(explanation['margin']):.2f} nats")
    expect(sheet).to_contain_text("Label mass")
    expect(sheet.get_by_role("meter", name="probability of a match")).to_have_attribute(
        "value", re.compile(rf"^{explanation['probability']:.3f}"[:5])
    )
    sheet.get_by_role("radio", name="Image alone").check()
    expect(sheet.get_by_role("img", name="Heat map")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(box(page)).to_have_value(QUERY)  # Escape closed the sheet, and cleared nothing


def require_brightest(canvas: Locator, place: tuple[int, int], shape: tuple[int, int]) -> None:
    """The pixels that are drawn, in so many rows and columns, are the brightest where the map is the highest."""
    light = canvas.evaluate(
        """(canvas, [rows, columns]) => {
            const context = canvas.getContext("2d"), found = [];
            for (let row = 0; row < rows; row += 1) for (let column = 0; column < columns; column += 1) {
                const x = (column + .5) * canvas.width / columns, y = (row + .5) * canvas.height / rows;
                const [red, green] = context.getImageData(x, y, 1, 1).data;
                found.push(red + green);
            }
            return found;
        }""",
        list(shape),
    )
    assert np.unravel_index(np.argmax(light), shape) == place


def test_a_map_of_the_square_around_an_image_is_cut_to_the_image(
    page: Page, watched: Watched
) -> None:
    """As of a model that puts a wide image in the middle of a square, two rows of four then show it."""
    watched.excused = "willReadFrequently"
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (90, 90, 90)).save(buffer, "PNG")
    page.route(
        "**/image", lambda route: route.fulfill(body=buffer.getvalue(), content_type="image/png")
    )

    def padded(route: Route) -> None:
        values = np.full((4, 4), 0.01)
        values[1, 3] = 0.85
        found = {
            "rows": 4,
            "columns": 4,
            "values": values.tolist(),
            "covers": "square",
            "share": 0.3,
        }
        route.fulfill(json=found)

    page.route("**/explain", padded)
    searched(page, QUERY)
    page.get_by_role("region", name="Fine order").locator(CARD).filter(
        has=page.locator(".view > img")
    ).first.get_by_role("button", name="Why").click()
    canvas = page.get_by_role("dialog").get_by_role("img", name="Heat map")
    expect(canvas).to_be_visible()
    size = canvas.bounding_box()
    assert size
    assert size["width"] == pytest.approx(2 * size["height"], rel=0.02)
    require_brightest(canvas, (0, 3), (2, 4))


def test_maps_are_laid_over_all_results_and_taken_off_again(page: Page) -> None:
    searched(page, QUERY)
    maps = page.get_by_role("region", name="Fine order").get_by_role("img", name="Heat map")
    shown = page.get_by_role("region", name="Fine order").locator(".view > img")
    page.get_by_label("Show where it looks").check()
    expect(maps).to_have_count(shown.count())
    image, over = shown.first.bounding_box(), maps.first.bounding_box()
    assert image
    assert over
    assert over["x"] == pytest.approx(image["x"], abs=1)
    assert over["width"] == pytest.approx(image["width"], abs=1)
    page.get_by_label("Show where it looks").uncheck()
    expect(maps).to_have_count(0)


def test_what_items_are_called_and_say_is_never_markup(page: Page) -> None:
    with answered(page):
        page.goto("/?" + str(httpx.QueryParams(like=TEXT_ONLY, n=20)))
    for name in ("Coarse order", "Fine order"):
        order(page, name)
    with answered(page):
        page.goto("/?" + str(httpx.QueryParams(q=HOSTILE, n=20, mode="coarse")))
    cards = page.locator(CARD).filter(has_text=HOSTILE)
    expect(cards).to_have_count(1)
    expect(cards.get_by_text(HOSTILE_ID, exact=True)).to_be_visible()
    assert cards.get_by_role("img").get_attribute("alt") == HOSTILE
    assert page.locator("#bold, .card script, [src=x]").count() == 0
    cards.get_by_role("button", name="Why").click()
    sheet = page.get_by_role("dialog")
    expect(sheet).to_contain_text(HOSTILE)
    sheet.get_by_role("button", name="More like this").click()
    expect(page.get_by_role("group", name="Query item")).to_contain_text(HOSTILE_ID)
    assert page.evaluate("window.broken") is None


def test_a_text_is_shown_where_there_is_no_image(page: Page, watched: Watched) -> None:
    searched(page, QUERY)
    card = page.get_by_role("region", name="Coarse order").locator(f"[data-id={TEXT_ONLY}]")
    expect(card).to_contain_text(QUERY)
    expect(card.get_by_role("img")).to_have_count(0)
    assert not [url for url in watched.asked if f"items/{TEXT_ONLY}" in url]
    card.get_by_role("button", name="Why").click()
    expect(page.get_by_role("dialog", name=TEXT_ONLY)).to_contain_text(QUERY)
    expect(page.get_by_role("radio", name="Before it answers")).to_be_hidden()


# ---- when something is wrong ----


def busy(route: Route) -> None:
    body = {"error": {"message": "too many requests are waiting", "type": "x", "param": None}}
    route.fulfill(status=503, headers={"retry-after": "2"}, json=body)


def test_a_busy_service_says_when_to_try_again(page: Page, watched: Watched) -> None:
    watched.excused = "503"
    page.route("**/search", busy)
    box(page).fill(QUERY)
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The service is busy. too many requests are waiting")
    expect(alert).to_contain_text("Try again in 2 seconds.")
    page.unroute("**/search")
    expect(alert.get_by_role("button", name="Try again", exact=True)).to_be_enabled()
    alert.get_by_role("button", name="Try again", exact=True).click()
    assert len(order(page, "Fine order")) == TOP_K
    expect(alert).to_be_hidden()


def test_a_service_that_is_gone_is_told(page: Page, watched: Watched) -> None:
    watched.excused = "ERR_CONNECTION_REFUSED"
    page.route("**/search", lambda route: route.abort("connectionrefused"))
    box(page).fill(QUERY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached.")
    expect(page.locator(CARD)).to_have_count(0)
    expect(page.get_by_role("button", name="Try again")).to_be_enabled()


def test_what_the_service_refuses_is_told_in_its_words(page: Page, watched: Watched) -> None:
    watched.excused = "400"
    page.get_by_label("Choose an image").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"<html>"}
    )
    expect(page.get_by_role("alert")).to_contain_text("none of JPEG, PNG, WEBP")
    page.goto("/?like=absent")
    expect(page.get_by_role("alert")).to_contain_text("the index holds no item 'absent'")


def test_nothing_is_not_searched_for(page: Page, watched: Watched) -> None:
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("There is nothing to search for.")
    assert not [url for url in watched.asked if url.endswith("/search")]


def test_a_degraded_answer_says_why(page: Page) -> None:
    def degraded(route: Route) -> None:
        found = route.fetch().json()
        found |= {"degraded": True, "shards_ok": 2, "shards_total": 3}
        found["degraded_reasons"] = ["partitions", "candidates", "budget"]
        found["results"][3] |= {"fine_score": None, "explanation": None, "problem": "it is <gone>"}
        route.fulfill(json=found)

    page.route("**/search", degraded)
    searched(page, QUERY)
    told = page.get_by_role("region", name="This answer is degraded")
    expect(told).to_contain_text("2 of 3 parts of the index answered")
    expect(told).to_contain_text("could not be read or scored")
    expect(told).to_contain_text("time budget ended")
    fourth = page.get_by_role("region", name="Fine order").locator(CARD).nth(3)
    expect(fourth).to_contain_text("not scored: it is <gone>")


def test_an_answer_without_results_says_so(page: Page) -> None:
    def empty(route: Route) -> None:
        route.fulfill(json={**route.fetch().json(), "results": [], "reranked": 0})

    page.route("**/search", empty)
    box(page).fill(QUERY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_contain_text("No results")


def test_while_it_waits_it_shows_that_it_does(page: Page) -> None:
    page.route("**/search", lambda _: None)  # never answered
    box(page).fill(QUERY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_have_text("Searching…")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".card.waits").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".card.waits")).to_have_count(0)
    expect(page.get_by_role("status").first).to_have_text("")
    expect(page.get_by_role("group", name="Example queries")).to_be_visible()


def test_with_a_key_everything_is_asked_with_it(page: Page, watched: Watched) -> None:
    watched.excused = "401"

    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer s3cret":
            route.continue_()
            return
        error = {"message": "send a key", "type": "unauthorized", "param": None, "code": None}
        route.fulfill(status=401, json={"error": error})

    page.route(re.compile(r"/(search|info|explain|items/.*)$"), guarded)
    page.goto("/")
    field = page.get_by_role("textbox", name="API key")
    expect(field).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(field).to_have_value("")
    field.fill("s3cret")
    page.get_by_role("button", name="Use the key").click()
    expect(page.get_by_role("heading", name="Search 33 items")).to_be_visible()
    expect(field).to_be_hidden()
    searched(page, QUERY)
    image = page.locator(".card .view > img").first
    assert str(image.get_attribute("src")).startswith("blob:")
    expect(image).to_have_js_property("naturalWidth", 96)
    assert "s3cret" not in page.url
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
    page.reload()
    expect(page.locator(CARD).first).to_be_visible()  # the tab still knows it


# ---- for everybody ----


def test_all_of_it_is_done_with_the_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("/")  # from anywhere
    expect(box(page)).to_be_focused()
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    order(page, "Fine order")
    page.keyboard.press("ArrowDown")
    cards = page.get_by_role("region", name="Fine order").locator(CARD)
    others = page.get_by_role("region", name="Coarse order").locator(CARD)
    expect(cards.nth(0)).to_be_focused()
    assert cards.nth(0).evaluate("(card) => getComputedStyle(card).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    expect(cards.nth(1)).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(others.nth(1)).to_be_focused()
    twin = str(others.nth(1).get_attribute("data-id"))
    expect(page.locator(f"{CARD}.twin[data-order=coarse]")).to_have_attribute("data-id", twin)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    expect(cards.last).to_be_focused()
    page.keyboard.press("Home")
    expect(cards.first).to_be_focused()
    name = str(cards.first.get_attribute("data-id"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name=name)).to_be_visible()
    page.keyboard.press("Escape")
    expect(cards.first).to_be_focused()
    page.keyboard.press("Tab")
    expect(cards.first.get_by_role("button", name="Why")).to_be_focused()
    page.keyboard.press("Tab")
    with answered(page) as response:
        page.keyboard.press("Enter")
    assert sent(response.value)["query"] == {"like": name}
    expect(page.get_by_role("group", name="Query item")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("group", name="Query item")).to_be_hidden()
    expect(page.locator(CARD)).to_have_count(0)
    expect(box(page)).to_be_focused()


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_width_makes_it_scroll_sideways(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})

    def require_fit() -> None:
        inside, whole = page.evaluate(
            "[document.documentElement.clientWidth, document.documentElement.scrollWidth]"
        )
        assert whole <= inside

    require_fit()
    searched(page, QUERY)
    require_fit()
    page.get_by_role("button", name="Why").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    sheet = page.get_by_role("dialog").bounding_box()
    assert sheet
    assert 0 <= sheet["x"] <= sheet["x"] + sheet["width"] <= width
    require_fit()
    page.keyboard.press("Escape")
    page.goto("/?" + str(httpx.QueryParams(q="x" * 300)))
    order(page, "Fine order")
    require_fit()


def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    searched(page, QUERY)
    page.get_by_role("button", name="Why").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    roles = "button|textbox|combobox|checkbox|radio|img|meter|link|article|region|group"
    told = page.locator("body").aria_snapshot()
    assert re.findall(rf"^\s*- (?:{roles})(?: \[[^\]]*\])*:?$", told, flags=re.MULTILINE) == []
    assert len(re.findall(rf"^\s*- (?:{roles}) \"", told, flags=re.MULTILINE)) > 50
    for role, name in (
        ("search", "Gallery"),
        ("textbox", "Search text"),
        ("button", "Image"),
        ("button", "Search"),
        ("combobox", "Stages"),
        ("combobox", "Results"),
        ("checkbox", "Show where it looks"),
        ("link", "API"),
        ("link", "Skip to the results"),
        ("region", "Coarse order"),
        ("region", "Fine order"),
    ):
        found = page.get_by_role(role, name=name, exact=True)  # type: ignore[arg-type]
        expect(found).to_have_count(1)
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings == ["slq gallery", "Coarse order", "Fine order"]
    for one in page.locator(".card .view > img").all():
        assert one.get_attribute("alt")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    searched(page, QUERY)
    pairs = page.evaluate(
        """(words) => [...document.querySelectorAll(words)].map((node) => {
            const paper = (one) => getComputedStyle(one).backgroundColor;
            let behind = node;
            while (paper(behind) === "rgba(0, 0, 0, 0)" && behind !== document.body) behind = behind.parentElement;
            return [getComputedStyle(node).color, paper(behind), node.className || node.tagName];
        })""",
        "h1, h2, .lead, .id, .scores, .move, .acts button, .about, .options label, .strong, footer div, #status",
    )
    assert len(pairs) > 30
    for ink, paper, name in pairs:
        assert contrast(ink, paper) >= 4.5, (name, ink, paper)


def contrast(ink: str, paper: str) -> float:
    """By the formula of WCAG 2."""

    def light(colour: str) -> float:
        levels = [float(one) / 255 for one in re.findall(r"[\d.]+", colour)[:3]]
        linear = [n / 12.92 if n <= 0.03928 else ((n + 0.055) / 1.055) ** 2.4 for n in levels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((light(ink), light(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_script_from_elsewhere_does_not_run(page: Page, watched: Watched) -> None:
    watched.excused = "Content Security Policy"
    blocked = page.evaluate(
        """async () => {
            const told = new Promise((resolve) => {
                document.addEventListener("securitypolicyviolation", (event) => resolve(event.violatedDirective));
            });
            const script = document.createElement("script");
            script.textContent = "window.broken = 3";
            document.body.append(script);
            return told;
        }"""
    )
    assert blocked.startswith("script-src")
    assert page.evaluate("window.broken") is None
    assert json.dumps(watched.complaints).count("Content Security Policy") == 1
