"""The report shows what the run's files say, escapes it, and leaves out what is not there."""

import base64
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.demo import demo_recipe
from jobs.report import write_report
from jobs.report.galleries import Runs, choose, outcome_counts, read_runs
from jobs.report.picture import gallery_picture
from jobs.report.settings import fine_stage, reproduce_command
from jobs.report.tables import hit_depths, p_text
from jobs.results import SYSTEM_NAMES
from pipelines.corpus import Record
from pipelines.recipe import BackboneConfig, Recipe, RerankConfig
from pipelines.training_log import write_history
from slq.arrow import ITEMS, RELEVANCE, RUN
from slq.enhancement import EnhancementConfig
from slq.errors import DataError
from slq.reranking.depth import AdaptiveDepth

DEMO = Path("jobs/recipes/demo.yaml").resolve()
COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta"]
ITEM_IDS = [f"item-{colour}" for colour in COLOURS]
SYSTEMS = ["last_token", "slq", "slq_fine", "slq_index", "untrained"]  # sorted, as in the file
ASKED_BY_TEXT = ("slq_fine", "slq_index")
SUBSETS = {"all": 4, "explicit": 3, "explicit, hard subset": 2, "knowledge": 1}
ATTACK = "<script>alert('x')</script> & \"two\" foxes"
MINUS = "\N{MINUS SIGN}"
TIMINGS = {"train": 12.34, "eval <b>": 6.17}

# query id -> text, kind, hard, right item, coarse order and fine order (as positions in ITEM_IDS)
QUERIES: dict[str, tuple[str, str, bool, int, list[int], list[int]]] = {
    "corrected": (ATTACK, "explicit", True, 0, [1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
    "kept": ("a lime square", "explicit", False, 1, [1, 0, 2, 3, 4, 5], [1, 2, 0, 3, 4, 5]),
    "spoiled": ("a blue square", "explicit", True, 2, [2, 0, 1, 3, 4, 5], [0, 1, 3, 2, 4, 5]),
    "missed": (
        "the colour of lemons",
        "knowledge",
        False,
        5,
        [0, 1, 2, 3, 4, 5],
        [1, 0, 2, 3, 4, 5],
    ),
}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def metrics(seed: int, count: int) -> dict[str, Any]:
    """Different numbers everywhere, so that a mixed-up cell shows."""
    report: dict[str, Any] = {"num_queries": count, "mrr": 0.5}
    for k in (1, 5, 10):
        value = (37 * seed + 11 * k) % 89 / 100 + 0.0512
        report[f"hit@{k}"] = value
        report[f"hit@{k}_interval"] = [value - 0.0123, value + 0.0345]
    return report


def results() -> dict[str, Any]:
    systems = {
        system: {
            direction: {
                name: metrics(31 * s + 7 * n + 3 * d, count)
                for n, (name, count) in enumerate(SUBSETS.items())
            }
            for d, direction in enumerate(("text_to_image", "image_to_text"))
        }
        for s, system in enumerate(SYSTEMS)
    }
    for system in ASKED_BY_TEXT:
        del systems[system]["image_to_text"]
    for system in ("slq", "slq_fine"):  # a tie: the fine stage reorders the first five only
        tie = {"hit@10": 0.9875, "hit@10_interval": [0.95, 1.0]}
        systems[system]["text_to_image"]["all"] |= tie
    p_values = dict(zip(SUBSETS, (0.0001, 0.0123, 0.5, 1.0), strict=True))
    return {
        "num_items": len(ITEM_IDS),
        "num_queries": len(QUERIES),
        "backbone": {"model": "tiny", "revision": "sha256:abc"},
        "systems": systems,
        "fine_against_coarse_p": p_values,
    }


def run_rows(stage: int) -> list[dict[str, Any]]:
    rows = []
    for query_id, (*_, coarse, fine) in QUERIES.items():
        for rank, item in enumerate((coarse, fine)[stage], start=1):
            cosine = 0.9 - coarse.index(item) / 10
            margin = None if stage == 0 or rank > 5 else 2.25 - rank
            rows.append(
                {
                    "query_id": query_id,
                    "item_id": ITEM_IDS[item],
                    "rank": rank,
                    "score": cosine if margin is None else margin,
                    "coarse_score": cosine,
                    "fine_score": margin,
                }
            )
    return rows


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A finished run in a folder whose name must be escaped, too."""
    out = tmp_path / "a&b"
    for name in ("data", "eval", "train", "adapter"):
        (out / name).mkdir(parents=True)
    items = [
        {"id": name, "image": png(colour), "text": None}
        for name, colour in zip(ITEM_IDS, COLOURS, strict=True)
    ]
    queries = [
        {"id": name, "image": None, "text": text, "kind": kind, "hard": hard, "split": "test"}
        for name, (text, kind, hard, *_) in QUERIES.items()
    ]
    relevance = [
        {"query_id": name, "item_id": ITEM_IDS[row[3]], "grade": 1} for name, row in QUERIES.items()
    ]
    pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), out / "data" / "gallery.parquet")
    pq.write_table(pa.Table.from_pylist(queries), out / "data" / "queries.parquet")
    pq.write_table(
        pa.Table.from_pylist(relevance, schema=RELEVANCE), out / "data" / "relevance.parquet"
    )
    for stage, name in enumerate(("slq", "slq_fine")):
        table = pa.Table.from_pylist(run_rows(stage)[::-1], schema=RUN)  # order must not matter
        pq.write_table(table, out / "eval" / f"run_{name}.parquet")
    (out / "eval" / "results.json").write_text(json.dumps(results()))
    steps = [{"step": n + 1, "loss": 4.0 / (n + 1), "temperature": 0.07} for n in range(3)]
    write_history(out / "train" / "history.jsonl", steps)
    adapter = {"fingerprint": "f" * 64, "hidden_size": 192}
    (out / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return demo_recipe(DEMO, out, ["train.num_steps=7", "backbone.name='it''s'"])


def rewrite_results(recipe: Recipe, change: Any) -> None:
    path = recipe.storage.evaluation / "results.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


class Page(HTMLParser):
    """The parts of a page that the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.right: list[bool] = []
        self.sections: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self._heading = self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        kinds = values.get("class", "").split()
        self.tags.add(tag)
        self.links += [values[name] for name in ("src", "href", "action", "data") if name in values]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = True
            self.tables[-1][-1].append("*" if "best" in kinds else "")
        elif tag == "small" and self._cell:
            self.tables[-1][-1][-1] += " "
        elif tag == "section":
            self.sections.append(values["id"])
        elif tag == "li" and set(kinds) & {"right", "other"}:
            self.right.append("right" in kinds)
        self._heading = tag == "h3"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data.strip()
        if self._heading and data.strip():
            self.headings.append(data)


def cell(entry: dict[str, Any], k: int, best: float) -> str:
    low, high = entry[f"hit@{k}_interval"]
    mark = "*" if entry[f"hit@{k}"] == best else ""
    return f"{mark}{100 * entry[f'hit@{k}']:.1f} {100 * low:.1f}\N{EN DASH}{100 * high:.1f}"


def expected_rows(direction: str, systems: list[str], ks: list[int]) -> list[list[str]]:
    found = results()["systems"]
    rows = []
    for name, count in SUBSETS.items():
        row = [name, str(count)]
        for k in ks:
            entries = [found[system][direction][name] for system in systems]
            best = max(entry[f"hit@{k}"] for entry in entries)
            row += [cell(entry, k, best) for entry in entries]
        rows.append(row)
    return rows


def test_tables_hold_the_numbers_of_the_results_file(recipe: Recipe) -> None:
    page = Page(write_report(recipe, TIMINGS).read_text())
    order = list(SYSTEM_NAMES)
    first, deeper, reverse = page.tables[:3]

    changes = []
    for name, p in results()["fine_against_coarse_p"].items():
        reports = [results()["systems"][s]["text_to_image"][name] for s in ("slq", "slq_fine")]
        change = 100 * (reports[1]["hit@1"] - reports[0]["hit@1"])
        shown = f"{change:+.1f}".replace("-", MINUS)
        changes.append(f"{shown} {'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}")
    expected = expected_rows("text_to_image", order, [1])
    assert first[1:] == [[*row, change] for row, change in zip(expected, changes, strict=True)]
    assert first[0][2:] == [*SYSTEM_NAMES.values(), f"fine {MINUS} coarse"]
    assert deeper[2:] == expected_rows("text_to_image", order, [5, 10])
    assert reverse[2:] == expected_rows("image_to_text", order[:3], [1, 5, 10])
    assert deeper[0][1:] == ["hit@5", "hit@10"]


def test_right_items_and_only_they_are_marked(recipe: Recipe) -> None:
    html = write_report(recipe, TIMINGS).read_text()
    page = Page(html)
    shown = [name for text in page.headings for name in QUERIES if QUERIES[name][0] in text]
    assert sorted(shown) == sorted(QUERIES)
    expected = [
        item == QUERIES[name][3]
        for name in shown
        for order in QUERIES[name][4:]
        for item in order[:5]
    ]
    assert page.right == expected
    assert html.count("✓") == sum(expected)


def test_thumbnails_scores_and_ranks_are_those_of_the_run(recipe: Recipe) -> None:
    html = write_report(recipe, TIMINGS).read_text()
    article = next(part for part in html.split("<article>") if "a blue square" in part)
    thumbnails = re.findall(r"data:image/png;base64,([^\"]+)", article)
    order = [item for row in QUERIES["spoiled"][4:] for item in row[:5]]
    for data, item in zip(thumbnails, order, strict=True):
        drawn = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert drawn.getpixel((4, 4)) == Image.new("RGB", (1, 1), COLOURS[item]).getpixel((0, 0))
    fine = article.split("<h4>fine")[1]
    margins = ["+1.25", "+0.25", f"{MINUS}0.75", f"{MINUS}1.75", f"{MINUS}2.75"]
    assert re.findall(r"margin (\S+)</div>", fine) == margins
    assert re.findall(r"cosine (\S+)</div>", fine) == ["0.800", "0.700", "0.600", "0.900", "0.500"]
    assert re.findall(r"right one at rank (\d)", article) == ["1", "4"]


def test_user_text_is_escaped(recipe: Recipe) -> None:
    html = write_report(recipe, TIMINGS).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;two&#34; foxes" in html
    assert "eval &lt;b&gt;" in html
    assert "a&b" not in html
    assert "script" not in Page(html).tags


def test_the_page_needs_nothing_from_outside(recipe: Recipe) -> None:
    html = write_report(recipe, TIMINGS).read_text()
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", html)
    links = Page(html).links
    assert links
    assert all(link.startswith("data:image/") for link in links)
    charts = [link.split(",")[1] for link in links if "svg" in link]
    for chart in charts:
        drawing = base64.b64decode(chart).decode()
        assert "<svg" in drawing
        assert not re.search(r"(href|src)=[\"']http", drawing)


def test_the_same_run_gives_the_same_page(recipe: Recipe) -> None:
    first = write_report(recipe, TIMINGS).read_bytes()
    assert write_report(recipe, TIMINGS).read_bytes() == first


def test_all_parts_are_there_when_all_files_are(recipe: Recipe) -> None:
    html = write_report(recipe, TIMINGS).read_text()
    page = Page(html)
    expected = ["results", "more-results", "training", "examples", "timings", "settings"]
    assert page.sections == expected
    assert "f" * 64 in html
    assert "20 \N{MULTIPLICATION SIGN} 192, with the temperature 3,841 trained numbers" in html
    rows = page.tables[3]
    assert [row[:2] for row in rows[1:]] == [
        ["train", "12.3"],
        ["eval <b>", "6.2"],
        ["total", "18.5"],
    ]
    assert "width:50.0%" in html


def test_missing_parts_are_left_out(recipe: Recipe) -> None:
    for name in ("train", "adapter"):
        shutil.rmtree(recipe.storage.dir / name)
    (recipe.storage.evaluation / "run_slq.parquet").unlink()
    page = Page(write_report(recipe, {}).read_text())
    assert page.sections == ["results", "more-results", "settings"]
    assert gallery_picture(recipe, recipe.storage.dir / "gallery.png") is None
    assert not (recipe.storage.dir / "gallery.png").exists()


def test_without_a_fine_stage_there_is_only_the_coarse_one(recipe: Recipe) -> None:
    def coarse_only(found: dict[str, Any]) -> None:
        del found["systems"]["slq_fine"], found["fine_against_coarse_p"]

    rewrite_results(recipe, coarse_only)  # its run file stays behind, and must not be believed
    html = write_report(recipe, TIMINGS).read_text()
    page = Page(html)
    assert f"fine {MINUS} coarse" not in html
    assert "SLQ + fine" not in html
    assert "<h4>fine" not in html
    assert "margin" not in html.split("</style>")[1]
    assert len(page.right) == 5 * len(QUERIES)
    assert "<b>2</b>right" in html
    assert "<b>2</b>wrong" in html
    assert gallery_picture(recipe, recipe.storage.dir / "gallery.png") is not None


def test_one_depth_and_one_direction_make_one_table(recipe: Recipe) -> None:
    def shallow(found: dict[str, Any]) -> None:
        for report in found["systems"].values():
            report.pop("image_to_text", None)
            for entry in report["text_to_image"].values():
                for k in (5, 10):
                    del entry[f"hit@{k}"], entry[f"hit@{k}_interval"]

    rewrite_results(recipe, shallow)
    page = Page(write_report(recipe, TIMINGS).read_text())
    assert "more-results" not in page.sections
    assert hit_depths(json.loads((recipe.storage.evaluation / "results.json").read_text())) == [1]


def test_a_run_without_results_names_the_way_out(recipe: Recipe) -> None:
    (recipe.storage.evaluation / "results.json").unlink()
    with pytest.raises(DataError, match=r"results\.json does not exist; run `slq eval`"):
        write_report(recipe, TIMINGS)


@pytest.mark.parametrize("name", ["queries", "corpus"])
def test_data_that_changed_after_the_evaluation_are_refused(recipe: Recipe, name: str) -> None:
    path = recipe.data.path(name)
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DataError, match=r"which was evaluated; run `slq eval` on the new data"):
        write_report(recipe, TIMINGS)


def test_every_outcome_is_counted(recipe: Recipe) -> None:
    runs = read_runs(recipe, SYSTEMS)
    assert runs is not None
    assert {name: runs.outcome(name) for name in QUERIES} == {name: name for name in QUERIES}
    counts = [(key, count) for key, _, count in outcome_counts(runs)]
    assert counts == [("corrected", 1), ("kept", 1), ("spoiled", 1), ("missed", 1)]


def made_up_runs(number: int) -> Runs:
    """Queries 0, 1, ... of two kinds, two queries per item, of which every third is right."""
    names = [f"q{n}" for n in range(number)]
    items = {name: f"i{n // 2}" for n, name in enumerate(names)}
    queries = {
        name: Record(name, "", None, name, {"kind": ("explicit", "knowledge")[n % 2]})
        for n, name in enumerate(names)
    }
    coarse = {
        name: [{"item_id": items[name] if n % 3 == 0 else "other"}] for n, name in enumerate(names)
    }
    return Runs(queries, {name: {items[name]} for name in names}, coarse, {})


def test_choice_fits_the_plan_and_shows_no_item_twice() -> None:
    runs = made_up_runs(40)
    chosen = choose(runs, [("explicit", "found"), ("knowledge", "lost"), ("knowledge", "found")])
    assert [runs.outcome(name) for name in chosen] == ["found", "lost", "found"]
    kinds = [runs.queries[name].columns["kind"] for name in chosen]
    assert kinds == ["explicit", "knowledge", "knowledge"]
    assert len({item for name in chosen for item in runs.relevant[name]}) == 3
    assert chosen == choose(
        runs, [("explicit", "found"), ("knowledge", "lost"), ("knowledge", "found")]
    )


def test_choice_prefers_the_outcome_to_the_group_and_ends_with_the_items() -> None:
    runs = made_up_runs(4)  # two items
    chosen = choose(runs, [("nothing", "found"), ("nothing", "nothing"), ("explicit", "found")])  # type: ignore[list-item]
    assert runs.outcome(chosen[0]) == "found"
    assert len(chosen) == 2


def test_the_command_names_what_differs_from_the_demo(recipe: Recipe) -> None:
    out = recipe.storage.dir
    words = shlex.split(reproduce_command(recipe))
    assert words[:4] == ["slq", "demo", "--out", str(out)]
    assert words[4::2] == ["--set", "--set"]
    assert demo_recipe(DEMO, out, words[5::2]) == recipe
    assert {word.split("=")[0] for word in words[5::2]} == {"train.num_steps", "backbone.name"}


def test_the_command_of_the_plain_demo_is_short(tmp_path: Path) -> None:
    recipe = demo_recipe(DEMO, tmp_path, None)
    assert reproduce_command(recipe) == f"slq demo --out {tmp_path}"


def test_picture_frames_the_right_item_in_green(recipe: Recipe) -> None:
    path = gallery_picture(recipe, recipe.storage.dir / "new" / "gallery.png")
    assert path is not None
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    assert picture.width == 1200
    # the first row is the corrected query: second place by cosine, first place by margin
    frame = (11, 122, 69)
    tops = [
        picture.getpixel((x + 40, 85)) == frame
        for x in [*range(24, 584, 112), *range(632, 1192, 112)]
    ]
    assert tops == [False, True, False, False, False, True, False, False, False, False]
    assert picture.getpixel((632 + 48, 88 + 48)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00009, "p < 0.001"), (0.001, "p = 0.001"), (0.0479, "p = 0.048"), (1.0, "p = 1.000")],
)
def test_p_values_read_as_in_papers(value: float, text: str) -> None:
    assert p_text(value) == text


def test_the_fine_stage_is_told_with_all_that_its_scores_depend_on() -> None:
    assert fine_stage(RerankConfig()) == "mcq question on the first 10 candidates"
    changed = RerankConfig(
        framing="lamra_rank",
        depth=9,
        instruction="Find it.",
        context_free="query",
        enhancement=EnhancementConfig(mode="static", layer=1, alpha=0.3),
    )
    assert fine_stage(changed) == (
        "lamra_rank question on the first 9 candidates, instruction 'Find it.', "
        "less the margin of an empty query, static visual enhancement of 0.3"
    )
    other = RerankConfig(
        profile="compat", adaptive=AdaptiveDepth(), backbone=BackboneConfig(name="other")
    )
    assert fine_stage(other) == (
        "true/false question on up to the first 10 candidates, by other, in the order of compat"
    )
