"""Two runs compared: ranks equal a loop's, the page holds them, nothing in the data is markup, and it works offline."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.diffing import run_name
from pipelines.benchmark import load_benchmark
from pipelines.difference import ALL, compare_runs, summary
from pipelines.recipe import Recipe
from slq.arrow import ITEMS, RELEVANCE, RUN
from slq.differences import Change, Standing, changes
from slq.errors import ConfigError, DataError
from slq.metrics import paired_permutation
from tests.browser import chromium, launched
from tests.integration.runs import changed

SCRIPT = "<script>window.broken = 1</script>"
EVIL_ITEM, EVIL_QUERY = f'i"><img src=x onerror="window.broken=2">{SCRIPT}', f"q' {SCRIPT} &amp;"
QUERIES, ITEM_COUNT, DEPTH = 30, 24, 8
QUERY_SCHEMA = pa.schema(
    [*ITEMS, ("kind", pa.string()), ("hard", pa.bool_()), ("split", pa.string())]
)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    colour = ((37 * number) % 256, (91 * number) % 256, (53 * number) % 256)
    Image.new("RGB", (40, 30), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with hostile ids and captions, a text-only item, a broken image, and two random runs."""
    home = tmp_path_factory.mktemp("diff")
    items = [{"id": f"item-{n}", "image": png(n), "text": None} for n in range(ITEM_COUNT)]
    items[0] = {"id": EVIL_ITEM, "image": png(0), "text": SCRIPT}
    items[1] |= {"image": None, "text": f"only words {SCRIPT}"}
    items[2] |= {"image": b"no image"}
    pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), home / "gallery.parquet")
    queries = [
        {
            "id": f"query-{n}",
            "text": f"text of {n}",
            "kind": ["explicit", "knowledge", SCRIPT][n % 3],
            "hard": n % 2 == 0,
            "split": "unseen" if n > 25 else "test",
        }
        for n in range(QUERIES)
    ]
    queries[0] |= {"id": EVIL_QUERY, "text": f"text {SCRIPT} of 0"}
    queries[1] |= {"text": None, "image": png(99)}
    pq.write_table(pa.Table.from_pylist(queries, schema=QUERY_SCHEMA), home / "queries.parquet")
    rng = np.random.default_rng(4)
    relevance, runs = [], ([], [])
    for query in queries:
        right = rng.choice(ITEM_COUNT, 1 + rng.integers(2), replace=False)
        if query["id"] != "query-7":
            for n in right.tolist():
                row = {"query_id": query["id"], "item_id": items[n]["id"], "grade": 1}
                relevance.append(row)
        for number, run in enumerate(runs):
            if query["id"] == ("query-8", "query-9")[number]:
                continue
            for rank, n in enumerate(rng.permutation(ITEM_COUNT)[:DEPTH].tolist(), start=1):
                fine = float(rng.normal()) if number and rank <= 3 else None
                scores = (1 - rank / 10, float(rng.normal()), fine)
                keys = ("score", "coarse_score", "fine_score")
                place = {"query_id": query["id"], "item_id": items[n]["id"], "rank": rank}
                run.append(place | dict(zip(keys, scores, strict=True)))
    pq.write_table(pa.Table.from_pylist(relevance, schema=RELEVANCE), home / "relevance.parquet")
    for name, run in zip("ab", runs, strict=True):
        pq.write_table(pa.Table.from_pylist(run, schema=RUN), home / f"run_{name}.parquet")
    return home


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return changed(Recipe(), data={"dir": folder})


def runs(folder: Path) -> tuple[Path, Path]:
    return folder / "run_a.parquet", folder / "run_b.parquet"


def looped(folder: Path) -> dict[str, tuple[int | None, int | None]]:
    """Ranks of the first relevant item, by plain loops over the files."""
    relevant = {
        (row["query_id"], row["item_id"])
        for row in pq.read_table(folder / "relevance.parquet").to_pylist()
    }
    judged = {query for query, _ in relevant}
    found: list[dict[str, int | None]] = []
    for path in runs(folder):
        ranks: dict[str, int | None] = {}
        for row in pq.read_table(path).to_pylist():
            ranks.setdefault(row["query_id"], None)
            before = ranks[row["query_id"]]
            if (row["query_id"], row["item_id"]) in relevant and before is None:
                ranks[row["query_id"]] = row["rank"]
        found.append(ranks)
    return {
        name: (found[0][name], found[1][name])
        for name in judged
        if name in found[0] and name in found[1]
    }


def test_ranks_equal_a_loop_and_what_changed_most_comes_first(folder: Path, recipe: Recipe) -> None:
    found = compare_runs(recipe, *runs(folder))
    expected = looped(folder)
    assert {one.query_id: (one.first, one.second) for one in found.changes} == expected
    moved = [
        abs((a or DEPTH + 1) - (b or DEPTH + 1))
        for a, b in (expected[c.query_id] for c in found.changes)
    ]
    assert moved == sorted(moved, reverse=True)
    assert {one.outcome for one in found.changes} == {"won", "lost", "same"}
    assert found.left_out == {"first only": 1, "second only": 1, "not judged": 1}


def test_the_summary_counts_and_tests_as_a_loop_does(folder: Path, recipe: Recipe) -> None:
    told = summary(compare_runs(recipe, *runs(folder)))
    ranks = looped(folder)
    names = sorted(ranks)
    plain = [[1 / r if (r := ranks[name][side]) else 0.0 for name in names] for side in (0, 1)]
    assert told[ALL]["mrr"] == pytest.approx([np.mean(plain[0]), np.mean(plain[1])])
    assert told[ALL]["mrr_p"] == paired_permutation(np.array(plain[1]), np.array(plain[0]))
    firsts = [np.array(side) == 1 for side in plain]
    assert told[ALL]["hit@1"] == pytest.approx([one.mean() for one in firsts])
    assert told[ALL]["won"] == sum((b or 9) < (a or 9) for a, b in ranks.values())
    assert told[ALL]["lost"] == sum((b or 9) > (a or 9) for a, b in ranks.values())
    kinds = {row["id"]: row for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    hard = [name for name in names if kinds[name]["hard"]]
    assert told["hard subset"]["num_queries"] == len(hard)
    assert set(told) == {ALL, "explicit", "knowledge", SCRIPT, "hard subset", "unseen objects"}


def test_a_change_is_judged_by_both_ranks() -> None:
    (one,) = changes({"q": Standing(2, 2)}, {"q": Standing(None, 3)})
    assert (one.first, one.second, one.outcome) == (2, None, "lost")
    assert one.ranks == (2, 4)
    assert Change("q", None, None, (3, 5)).outcome == "same"
    assert Change("q", None, 3, (3, 5)).outcome == "won"
    assert changes({"q": Standing(1, 1)}, {"p": Standing(1, 1)}) == []


def tied_runs(folder: Path) -> tuple[Recipe, list[Path]]:
    """Random runs of few different scores, in two files in different orders of the rows, and their recipe."""
    rng = np.random.default_rng(8)
    items = [{"id": f"i{n}", "image": None, "text": f"item {n}"} for n in range(9)]
    queries = [{"id": f"q{n}", "text": f"query {n}"} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), folder / "gallery.parquet")
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    answers = [
        {"query_id": query["id"], "item_id": f"i{n}", "grade": 1 + n % 3}
        for query in queries
        for n in rng.choice(9, 2, replace=False).tolist()
    ]
    pq.write_table(pa.Table.from_pylist(answers, schema=RELEVANCE), folder / "relevance.parquet")
    paths = []
    for name in "ab":
        rows = [
            {"query_id": query["id"], "item_id": f"i{n}", "score": float(rng.integers(3))}
            for query in queries
            for n in rng.permutation(9)[:6].tolist()
        ]
        paths.append(folder / f"{name}.parquet")
        pq.write_table(pa.Table.from_pylist(rows), paths[-1])
    return changed(Recipe(), data={"dir": folder}), paths


def test_equal_scores_count_against_both_runs_as_in_an_evaluation(tmp_path: Path) -> None:
    recipe, paths = tied_runs(tmp_path)
    relevant: dict[str, set[str]] = {}
    for row in pq.read_table(tmp_path / "relevance.parquet").to_pylist():
        relevant.setdefault(row["query_id"], set()).add(row["item_id"])
    found = compare_runs(recipe, *paths)
    for side, path in enumerate(paths):
        scores: dict[str, dict[str, float]] = {}
        for row in pq.read_table(path).to_pylist():
            scores.setdefault(row["query_id"], {})[row["item_id"]] = row["score"]
        ranks = {}
        for query, of_query in scores.items():
            rights = [of_query[name] for name in relevant[query] if name in of_query]
            others = [score for name, score in of_query.items() if name not in relevant[query]]
            # whatever is not right and not worse comes before the best of the right ones
            ranks[query] = 1 + sum(one >= max(rights) for one in others) if rights else None
        assert {one.query_id: (one.first, one.second)[side] for one in found.changes} == ranks
        for query, places in (found.first, found.second)[side].items():  # and so they are shown
            shown = [n for n, p in enumerate(places, 1) if p.item_id in relevant[query]]
            assert next(iter(shown), None) == ranks[query]
            assert [p.score for p in places] == sorted((p.score for p in places), reverse=True)


def test_wordings_are_one_query_and_equal_items_are_right_as_in_an_evaluation(
    tmp_path: Path,
) -> None:
    items = [{"id": name, "text": f"item {name[0]}"} for name in ("a", "a2", "b", "c", "c2")]
    queries = [
        {"id": f"{name}-{n}", "text": f"{name} said {n}", "query_group": name, "kind": "dress"}
        for name in ("dress-0", "dress-1")
        for n in (0, 1)
    ]
    queries.append({"id": "plain", "text": "alone", "query_group": None, "kind": None})
    answers = [("dress-0", "a"), ("dress-1", "b"), ("plain", "c2")]
    run = [
        {"query_id": query, "item_id": name, "score": -float(rank)}
        for query in ("dress-0", "dress-1", "plain")
        for rank, name in enumerate(("c", "a2", "a", "b", "c2"))
    ]
    rows = {
        "gallery": items,
        "queries": queries,
        "relevance": [{"query_id": q, "item_id": i, "grade": 1} for q, i in answers],
        "a": run,
        "b": [row | {"score": -row["score"]} for row in run],
    }
    for name, table in rows.items():
        pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet")
    paths = tmp_path / "a.parquet", tmp_path / "b.parquet"
    expected = {
        "apart": {"dress-0": (3, 3), "dress-1": (4, 2), "plain": (5, 1)},
        "together": {"dress-0": (2, 3), "dress-1": (4, 2), "plain": (1, 1)},
    }
    for same_images, ranks in expected.items():
        recipe = changed(Recipe(), data={"dir": tmp_path}, eval={"same_images": same_images})
        found = compare_runs(recipe, *paths)
        assert {one.query_id: (one.first, one.second) for one in found.changes} == ranks
        benchmark = load_benchmark(recipe)
        assert found.relevant == {
            query.id: {benchmark.items[n].id for n in right.nonzero()[0]}
            for query, right in zip(benchmark.queries, benchmark.relevant, strict=True)
        }
        assert {name: one.text for name, one in found.queries.items()} == {
            query.id: query.text for query in benchmark.queries
        }
        assert summary(found)["dress"]["num_queries"] == 2
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(json.dumps({"data": {"dir": str(tmp_path)}}))
    target = tmp_path / "page.html"
    done = slq(*paths, "--data", recipe_file, "--out", target)
    assert done.exit_code == 0, done.output
    assert "dress-1 said 0" in Page(target.read_text()).text


def test_a_path_is_no_markup_for_the_terminal(
    folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "[" / "bold].html"
    done = slq(*runs(folder), "--data", recipe_file, "--out", target)
    assert done.exit_code == 0, done.output
    assert str(target) in done.stdout


class Page(HTMLParser):
    """Articles with their attributes and images, and everything that could be fetched or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.articles: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.handlers: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.handlers += [name for name in values if name.startswith("on")]
        self.links += [values[name] for name in ("src", "href", "action") if name in values]
        if tag == "article":
            self.articles.append({**values, "items": [], "text": ""})
        if tag == "li" and self.articles:
            right = values["class"] == "right"
            self.articles[-1]["items"].append((values["title"], right))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.articles:
            self.articles[-1]["text"] += data


def slq(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


@pytest.fixture(scope="module")
def recipe_file(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"data": {"dir": str(folder)}}))
    return path


@pytest.fixture(scope="module")
def page(folder: Path, recipe_file: Path) -> Path:
    target = folder / "page.html"
    names = ("--name-a", f"A {SCRIPT}", "--name-b", "B")
    done = slq(*runs(folder), "--data", recipe_file, "--out", target, *names)
    assert done.exit_code == 0, done.output
    return target


def test_the_page_holds_what_changed_with_ranks_and_right_items(
    page: Path, folder: Path, recipe: Recipe
) -> None:
    found, ranks = Page(page.read_text()), looped(folder)
    moved = [one for one in compare_runs(recipe, *runs(folder)).changes if one.outcome != "same"]
    assert [one["data-id"] for one in found.articles] == [one.query_id for one in moved]
    relevant = {
        (row["query_id"], row["item_id"])
        for row in pq.read_table(folder / "relevance.parquet").to_pylist()
    }
    rows = [pq.read_table(path).to_pylist() for path in runs(folder)]
    for article in found.articles:
        name = article["data-id"]
        first, second = ranks[name]
        better = (second or 9) < (first or 9)
        assert article["data-outcome"] == ("won" if better else "lost")
        said = [f"rank {rank}" if rank else f"below rank {DEPTH}" for rank in (first, second)]
        assert " → ".join(said) in article["text"]
        shown = [
            row["item_id"]
            for run in rows
            for row in run
            if row["query_id"] == name and row["rank"] <= 5
        ]
        assert [item for item, _ in article["items"]] == shown
        assert [right for _, right in article["items"]] == [
            (name, item) in relevant for item in shown
        ]


def test_nothing_in_the_data_is_markup_and_nothing_is_fetched(page: Path) -> None:
    html = page.read_text()
    found = Page(html)
    assert found.tags.count("script") == 1
    assert html.count(SCRIPT) == 0
    assert found.handlers == []
    assert all(link.startswith(("data:image/", "#")) for link in found.links)
    assert SCRIPT in found.text
    assert {json.dumps(json.loads(one["data-tags"])) for one in found.articles}
    assert "(cannot be shown) item-2" in found.text


def test_the_command_tells_the_same_as_json_and_a_dry_run_writes_nothing(
    folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "none.html"
    options = ("--data", recipe_file, "--out", target, "--dry-run")
    told = json.loads(slq(*runs(folder), *options, "--json").stdout)
    assert not target.exists()
    assert {one["query_id"]: tuple(one["ranks"]) for one in told["queries"]} == looped(folder)
    assert told["systems"] == ["a", "b"]
    text = slq(*runs(folder), *options).stdout
    assert "1 queries are only in the run of a: left out" in text


def test_a_trec_run_compares_as_its_parquet_file(
    folder: Path, recipe: Recipe, tmp_path: Path
) -> None:
    rows = [
        row
        for row in pq.read_table(runs(folder)[1]).to_pylist()
        if " " not in row["query_id"] + row["item_id"]
    ]
    lines = [f"{r['query_id']} Q0 {r['item_id']} {r['rank']} {r['score']} b" for r in rows]
    (tmp_path / "b.trec").write_text("\n".join(lines))
    pq.write_table(pa.Table.from_pylist(rows, schema=RUN), tmp_path / "b.parquet")
    one, other = (
        compare_runs(recipe, runs(folder)[0], tmp_path / name) for name in ("b.trec", "b.parquet")
    )
    assert one.changes == other.changes
    assert {place.fine for places in one.second.values() for place in places} == {None}


def test_wrong_files_are_refused(
    folder: Path, recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    first, second = runs(folder)
    with pytest.raises(ConfigError, match=r"RUN_B: .*none.parquet does not exist"):
        compare_runs(recipe, first, tmp_path / "none.parquet")
    (tmp_path / "bad.trec").write_text("q Q0 item 1\n")
    with pytest.raises(DataError, match=r"RUN_A: .*bad.trec: line 1 has 4 columns"):
        compare_runs(recipe, tmp_path / "bad.trec", second)
    (tmp_path / "other.trec").write_text("x Q0 item-3 1 0.5 a\n")
    with pytest.raises(DataError, match="have no query in common"):
        compare_runs(recipe, first, tmp_path / "other.trec")
    table = pq.read_table(second)
    bad = pa.array([float("nan")] * table.num_rows, pa.float32())
    place = table.schema.get_field_index("fine_score")
    pq.write_table(table.set_column(place, "fine_score", bad), tmp_path / "nan.parquet")
    with pytest.raises(DataError, match=r"RUN_B: .* has the score nan"):
        compare_runs(recipe, first, tmp_path / "nan.parquet")
    (tmp_path / "item.trec").write_text("query-3 Q0 nowhere 1 0.5 a\nquery-3 Q0 item-3 2 0.4 a\n")
    options = ("--data", recipe_file, "--out", tmp_path / "page.html")
    for arguments, message in (
        ((first, tmp_path / "item.trec", *options), "has no 'nowhere', which a run names"),
        ((first, second, "--data", recipe_file, "--out", tmp_path), "is a folder; name a file"),
        (
            (first, second, "--data", tmp_path / "no.yaml", "--out", tmp_path / "p"),
            "does not exist",
        ),
    ):
        done = slq(*arguments)
        assert done.exit_code == 1
        assert message in " ".join(done.stderr.split())
    (tmp_path / "file").touch()
    done = slq(first, second, "--data", recipe_file, "--out", tmp_path / "file" / "page.html")
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr


def test_systems_are_named_by_their_files() -> None:
    fine, coarse = Path("x/eval/run_slq_fine.parquet"), Path("x/eval/run_slq.parquet")
    assert run_name(fine, coarse) == "SLQ + fine stage"
    assert run_name(Path("run_slq.cut.48.parquet"), fine) == "slq@48"
    assert (
        run_name(Path("a/eval/run_slq.parquet"), Path("b/eval/run_slq.parquet"))
        == "SLQ (trained) (a)"
    )
    assert run_name(Path("bm25.trec"), coarse) == "bm25"


@pytest.mark.skipif(chromium() is None, reason="needs Chromium (or Chrome) on the PATH")
def test_it_filters_and_moves_by_keyboard_in_a_browser_without_a_network(page: Path) -> None:
    found = Page(page.read_text()).articles
    with launched() as browser:
        context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
        tab = context.new_page()
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(page.as_uri())
        visible = tab.locator("article:visible")
        assert visible.count() == len(found)
        tab.get_by_label("Show", exact=True).select_option("lost")
        lost = [one for one in found if one["data-outcome"] == "lost"]
        assert visible.count() == len(lost)
        tab.get_by_label("Kind", exact=True).select_option(SCRIPT)
        both = [one for one in lost if SCRIPT in json.loads(one["data-tags"])]
        assert visible.count() == len(both)
        assert tab.locator("#count").text_content() == f"{len(both)} of {len(found)} shown"
        tab.get_by_label("Kind", exact=True).select_option("")
        tab.get_by_label("Show", exact=True).select_option("")
        tab.locator("h1").click()
        tab.keyboard.press("/")
        tab.keyboard.type("no such words")
        assert tab.get_by_text("No query fits these filters.").is_visible()
        tab.keyboard.press("Escape")
        for key, place in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
            tab.keyboard.press(key)
            focused = tab.evaluate("document.activeElement.dataset.id")
            assert focused == found[place]["data-id"]
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("window.broken") is None
        unnamed = "[...document.images].filter((one) => !one.alt).length"
        assert tab.evaluate(unnamed) == 0
        assert said == []
        context.close()
