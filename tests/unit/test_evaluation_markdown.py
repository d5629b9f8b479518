"""results.md and where figures come from: every figure of the JSON in its row, published ones beside, files named."""

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.report.evaluation import lines, metric_names, write_markdown
from pipelines.benchmark import Benchmark
from pipelines.provenance import cpu_name, data_digests, git_revision, provenance
from pipelines.ranking import Scores, summarise
from pipelines.recipe import Recipe
from slq.benchmarks.contract import BenchmarkConfig, Facts
from slq.benchmarks.fashion_iq import FashionIqConfig
from slq.benchmarks.karpathy import KarpathyConfig
from slq.benchmarks.mmeb_eval import GROUPS, MmebEvalConfig
from slq.benchmarks.published import FLICKR, Published
from slq.benchmarks.sugar_crepe import SugarCrepeConfig
from slq.errors import StorageError
from slq.schema import Item
from tests.integration.runs import changed


def results(**more: Any) -> dict[str, Any]:
    """Of two systems on two kinds of queries."""
    rng = np.random.default_rng(0)
    relevant = np.eye(12, dtype=bool)
    queries = [
        Item(text="x", id=f"q{n}", columns={"kind": "a|b" if n < 5 else "c"}) for n in range(12)
    ]
    items = [Item(text="x", id=f"i{n}") for n in range(12)]
    scores = {
        name: Scores((rng.random((12, 12)) + lift * relevant).astype(np.float32))
        for name, lift in (("untrained", 0.2), ("slq", 0.7))
    }
    recipe = changed(Recipe(), eval={"metrics": ("ndcg@10",)})
    found = summarise(recipe, Benchmark(items, queries, relevant), scores)
    return {"backbone": {"model": "tiny", "revision": "r1"}, "fingerprint": "abc", **found, **more}


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in text.split("\n## ")[1:]:
        title, _, rest = part.partition("\n")
        found[title] = rest.splitlines()
    return found


def test_every_figure_stands_in_the_row_of_its_system() -> None:
    told = results()
    found = sections("\n".join(lines(told)))
    for direction, title in (
        ("text_to_image", "text -> image"),
        ("image_to_text", "image -> text"),
    ):
        for subset in ("a|b", "c"):
            reports = {name: of[direction][subset] for name, of in told["systems"].items()}
            rows = found[f"{title}, {subset} (n = {reports['slq']['num_queries']})"]
            names = metric_names(reports["slq"])
            assert rows[1] == f"| system | {' | '.join(names)} |"
            for row, (_, report) in zip(rows[3:5], reports.items(), strict=True):
                cells = row.replace("**", "").split(" | ")[1:]
                for name, cell in zip(names, cells, strict=True):
                    low, high = report[f"{name}_interval"]
                    wanted = f"{100 * report[name]:.1f} ({100 * low:.1f}-{100 * high:.1f})"
                    assert cell.removesuffix(" |") == wanted
            assert rows[3].startswith("| zero-shot untrained latents | ")
            assert all(row.count("**") >= 2 for row in rows[3:5] if "SLQ (trained)" in row)
            (test,) = told["paired"][direction][subset]["hit@1"]
            shown = next(row for row in rows if row.startswith("| SLQ (trained) - "))
            assert f"{100 * test['difference']:+.1f}".replace("-", "\N{MINUS SIGN}") in shown


def test_metrics_stand_by_kind_and_depth() -> None:
    names = ("hit@10", "hit@5", "map", "mrr", "hit@1", "ndcg@10")
    entry = dict.fromkeys(names, 0.0) | {f"{name}_interval": (0, 0) for name in names}
    assert metric_names({**entry, "num_queries": 3}) == [
        "hit@1", "hit@5", "hit@10", "map", "mrr", "ndcg@10",
    ]  # fmt: skip


def number(model: str, value: float, source: str) -> Published:
    return Published(model, "coco", "text -> image", "hit@1", value, source)


def test_the_papers_numbers_are_those_that_are_looked_up() -> None:
    told = results(benchmark={"name": FLICKR, "is_published": True})
    text = "\n".join(lines(told))
    assert f"Published on {FLICKR}:" in text
    (row,) = {
        one
        for one in text.splitlines()
        if one.startswith("| SLQ (InternVL3-1B) |") and "74.4" in one
    }
    assert "92.9" in row


def test_published_numbers_stand_below_ours_where_there_are_any() -> None:
    asked = []

    def published_of(benchmark: str, direction: str, metric: str) -> Sequence[Published]:
        asked.append((benchmark, direction, metric))
        if (direction, metric) == ("text -> image", "hit@1"):
            return [number("SLQ-1B", 48.5, "arXiv 1, table 2"), number("other", 50.0, "arXiv 2")]
        if (direction, metric) == ("text -> image", "hit@5"):
            return [number("SLQ-1B", 74.3, "arXiv 1, table 2")]
        return []

    told = results(benchmark={"name": "coco", "is_published": True})
    found = sections("\n".join(lines(told, published_of)))
    rows = found["text -> image, c (n = 7)"]
    assert "Published on coco:" in rows
    head = next(row for row in rows if row.startswith("| model"))
    names = head.strip("| ").split(" | ")
    first, second = (next(r for r in rows if r.startswith(f"| {m} |")) for m in ("SLQ-1B", "other"))
    values = dict(zip(names, (c.strip() for c in first.strip("|").split("|")), strict=True))
    assert (values["hit@1"], values["hit@5"], values["hit@10"]) == ("48.5", "74.3", "")
    assert values["source"] == "arXiv 1, table 2"
    assert "50.0" in second
    assert not any("Published" in row for row in found["image -> text, c (n = 7)"])
    assert ("coco", "image -> text", "ndcg@10") in asked
    asked.clear()
    assert "Published" not in "\n".join(lines(results(), published_of))  # of one's own data
    other_part = results(benchmark={"name": "coco", "is_published": False})
    assert "Published" not in "\n".join(lines(other_part, published_of))
    assert not asked


KARPATHY: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"annotations": "dataset_flickr30k.json"}, True),
    ({"eval_split": "val", "train_splits": ()}, False),
    ({"expected": {}}, False),
    ({"expected": {"gallery": 100}}, False),
    ({"eval_captions": 1}, False),
]


@pytest.mark.parametrize(("settings", "is_shown"), KARPATHY)
def test_numbers_of_the_papers_stand_only_beside_what_the_papers_measured(
    settings: dict[str, Any], is_shown: bool
) -> None:
    facts = KarpathyConfig.model_validate(settings).facts()
    text = "\n".join(lines(results(benchmark=facts.plain())))
    assert (f"Published on {facts.name}:" in text) == is_shown


def of_groups(facts: Facts) -> dict[str, Any]:
    """Results of two systems on a benchmark of several kinds, three queries each."""
    kinds = sorted({kind for members in facts.groups.values() for kind in members})
    queries = [
        Item(text="x", id=f"{kind}-{n}", columns={"kind": kind}) for kind in kinds for n in range(3)
    ]
    rng = np.random.default_rng(1)
    relevant = np.zeros((len(queries), 60), dtype=bool)
    relevant[np.arange(len(queries)), rng.integers(60, size=len(queries))] = True
    benchmark = Benchmark([Item("x", id=f"i{n}") for n in range(60)], queries, relevant)
    scores = {
        name: Scores((rng.random(relevant.shape) + 0.7 * relevant).astype(np.float32))
        for name in ("untrained", "slq")
    }
    return summarise(Recipe(), replace(benchmark, facts=facts), scores)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.replace("**", "").strip("| ").split("|")]


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (
            MmebEvalConfig(format="mmeb_eval"),
            {"hit@1 all": "54.2", "hit@1 VQA": "27.8", "hit@1 grounding": "60.2"},
        ),
        (
            MmebEvalConfig(format="mmeb_eval", subsets=(*GROUPS["grounding"], "GQA", "VOC2007")),
            {"hit@1 all": "", "hit@1 VQA": "", "hit@1 grounding": "60.2"},
        ),
        (
            SugarCrepeConfig(format="sugar_crepe"),
            {"hit@1 replace": "94.8", "hit@1 swap": "92.7", "hit@1 add": "96.2"},
        ),
        (
            SugarCrepeConfig(format="sugar_crepe", categories=("add_att", "add_obj", "swap_att")),
            {"hit@1 swap": "", "hit@1 add": "96.2"},
        ),
        (MmebEvalConfig(format="mmeb_eval", expected={}), None),
        (SugarCrepeConfig(format="sugar_crepe", expected={"swap_att": 3}), None),
        (FashionIqConfig(format="fashion_iq"), None),
    ],
)
def test_means_over_kinds_have_their_table_and_the_papers_means_stand_below(
    config: BenchmarkConfig, published: dict[str, str] | None
) -> None:
    facts = config.facts()
    told = json.loads(json.dumps(of_groups(facts)))
    found = sections("\n".join(lines(told)))[f"{facts.direction}, means over kinds"]
    tables = [row for row in found if row.startswith("| ")]
    (metrics,) = facts.headline.values()
    names = [f"{metric} {group}" for group in facts.groups for metric in metrics]
    assert cells(tables[0]) == ["system", *names]
    for row, (_, report) in zip(tables[1:3], told["systems"].items(), strict=True):
        for name, cell in zip(names, cells(row)[1:], strict=True):
            metric, _, group = name.partition(" ")
            of_kinds = [report["text_to_image"][kind][metric] for kind in facts.groups[group]]
            assert cell == f"{100 * np.mean(of_kinds):.1f}"
    if published is None:
        assert len(tables) == 3
        return
    head = cells(tables[3])
    (theirs,) = (one for one in tables[4:] if one.startswith("| RetLLM (Qwen2.5-VL-7B, CLIP"))
    shown = dict(zip(head, cells(theirs), strict=True))
    assert {name: shown[name] for name in published} == published
    assert shown["source"].startswith("RetLLM, arXiv")


def test_an_index_is_said_to_give_a_few_items_only() -> None:
    sentence = "SLQ through the index gives 10 items of each query"
    text = "\n".join(lines(results(cut_at={"slq_index": 10})))
    assert f"{sentence}: its mrr, map and ndcg without a depth count no other" in text
    assert sentence not in "\n".join(lines(results()))


def test_what_was_measured_with_is_told_and_nothing_breaks_the_table(tmp_path: Path) -> None:
    told = results(provenance=provenance(Recipe(), command="slq eval 'a|b.yaml'"), num_unreadable=3)
    path = write_markdown(tmp_path, told)
    assert [one.name for one in tmp_path.iterdir()] == ["results.md"]
    text = path.read_text()
    for part in (
        "12 queries on 12 items (3 items or queries could not be read, and are left out).",
        "| command | `slq eval 'a\\|b.yaml'` |",
        "| adapter fingerprint | abc |",
        "| backbone | tiny r1 |",
        f"python {platform.python_version()}",
        "| setting: eval | ",
    ):
        assert part in text
    widths = {
        row.replace("\\|", "").count("|") for row in sections(text)["How it was measured"] if row
    }
    assert widths == {3}


def test_a_folder_that_is_none_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"results\.md cannot be written"):
        write_markdown(tmp_path / "gone", results())


def test_digests_are_those_of_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "queries.parquet").write_bytes(b"some")
    (tmp_path / "gallery").mkdir()
    recipe = changed(Recipe(), data={"dir": tmp_path, "corpus": "gallery"})
    assert data_digests(recipe) == {"queries": hashlib.sha256(b"some").hexdigest()}
    assert data_digests(changed(recipe, data={"corpus": "s3://bucket/x"})) == data_digests(recipe)


def test_the_revision_is_that_of_the_checkout_that_holds_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=x", "-c", "user.email=x@x.x")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *author, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    code, other = tmp_path / "code.py", tmp_path / "untracked.py"
    code.write_text("1")
    other.write_text("2")
    assert git_revision(code) is None  # no repository
    git("init")
    git("add", "code.py")
    git("commit", "-m", "first")
    revision = git("rev-parse", "HEAD")
    assert git_revision(code) == revision
    assert git_revision(other) is None  # as of a package installed below a repository
    code.write_text("3")
    assert git_revision(code) == f"{revision}+changes"


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_the_processor_has_the_name_that_the_system_gives() -> None:
    """lscpu asks the kernel in its own way."""
    tool = shutil.which("lscpu")
    if tool is None or not Path("/proc/cpuinfo").is_file():
        pytest.skip("there is no lscpu to compare with")
    told = json.loads(subprocess.run([tool, "-J"], capture_output=True, check=True).stdout)
    names = [one["data"] for one in told["lscpu"] if one["field"] == "Model name:"]
    if not names or "model name" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the system does not name its processor")
    assert names[0].strip()
    assert cpu_name().split() == names[0].split()
