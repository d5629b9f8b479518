"""`slq bench ablations`: every figure against another way to it, and nothing scored or measured twice."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jobs.bench.ablations import run
from jobs.bench.ablations.listwise import (
    compared,
    means,
    option_tokens,
    pair_questions,
    position_report,
)
from jobs.bench.ablations.orders import (
    both_orders,
    first_hits,
    histogram,
    keys_of,
    pair_report,
    ranks,
    tied_share,
)
from jobs.bench.ablations.reading import Reader
from jobs.bench.ablations.running import Bench
from jobs.bench.ablations.scores import Readings, Scorer
from jobs.bench.ablations.settings import Scoring, rows_of
from jobs.bench.ablations.subject import Subject, load_subject
from jobs.bench.ablations.tables import markdown, summary
from pipelines.loading import backbone_of, untrained_latents
from pipelines.recipe import Recipe, load_recipe
from slq.artifacts import save_adapter
from slq.backbones import Backbone
from slq.enhancement import EnhancementConfig
from slq.errors import ArtifactError, ConfigError
from slq.metrics import paired_permutation
from slq.reranker import Reranker
from slq.reranking.framings import FRAMINGS, framing_by_name
from slq.schema import Item
from tests.naive import turn_inputs, turn_logits, written_out_positions

DEPTH = 3
SETTINGS = ["data.scenes={train: 2, test: 24, unseen: 2, seed: 7, hard_share: 0.5}"]
ROWS = {row.name: row for row in rows_of("true_false", DEPTH, num_layers=6)}


def places(folder: Path) -> list[str]:
    return [*SETTINGS, f"storage.dir={folder}", f"data.dir={folder / 'data'}"]


def with_adapter(folder: Path) -> Recipe:
    recipe = load_recipe(Path("jobs/recipes/demo.yaml"), places(folder))
    backbone = backbone_of(recipe)
    recipe.storage.adapter.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(recipe.storage.adapter, backbone, untrained_latents(recipe, backbone))
    return recipe


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(with_adapter(tmp_path_factory.mktemp("run")), 6)


@pytest.fixture(scope="module")
def tiny(subject: Subject) -> Backbone:
    return subject.backbone


def caption_of(subject: Subject, query: int) -> str:
    return str(subject.queries[query].text)


# What is measured on


def test_pairs_hold_the_same_objects_and_their_own_captions(subject: Subject) -> None:
    names = [query.id for query in subject.queries]
    assert [name.rsplit("-", 1)[1] for name in names] == ["explicit"] * 6 + ["knowledge"] * 6
    for query, item in enumerate(subject.own):
        assert names[query].startswith(f"{subject.items[item].id}-")
        assert subject.relevant[query].nonzero()[0].tolist() == [item]
    within = subject.within_pairs().reshape(-1, 2, 2, 2)
    for (first, second), of_pair in zip(subject.pairs, within, strict=True):
        assert int(names[second][5:10]) == int(names[first][5:10]) + 1  # neighbours in the gallery
        for image, caption in itertools.product((0, 1), (0, 1)):
            query, item = of_pair[image, caption]
            assert query == (first, second)[caption]
            assert item == subject.own[(first, second)[image]]


def test_candidates_are_the_best_by_coarse_score(subject: Subject) -> None:
    for query, row in enumerate(subject.best(4)):
        scores = subject.coarse[query]
        assert scores[row].tolist() == sorted(scores.tolist(), reverse=True)[:4]
    found = subject.candidates(4)
    assert found[:, 1].reshape(-1, 4).tolist() == subject.best(4).tolist()
    assert found[:, 0].tolist() == [query for query in range(12) for _ in range(4)]


# What is read of pairs


@pytest.mark.parametrize("name", sorted(FRAMINGS))
def test_readings_are_those_of_the_reranker(subject: Subject, name: str) -> None:
    pairs = [(subject.queries[n], subject.items[n % 5]) for n in range(9)]
    scorer = Scorer(subject.backbone, Scoring(name), 4)
    columns = scorer.read(pairs)
    expected = Reranker(subject.backbone, framing=name).read(pairs)
    assert columns["margin"].tolist() == pytest.approx([r.margin for r in expected], abs=1e-4)
    assert columns["entropy"].tolist() == pytest.approx([r.entropy for r in expected], abs=1e-4)
    assert columns["label_mass"].tolist() == pytest.approx(
        [r.label_mass for r in expected], abs=1e-4
    )
    variants = [(word, value) for word, _, value in scorer.labels]
    cut = keys_of(columns, variants, scorer.framing, order="entropy", labels="all")
    assert cut[:, 0].tolist() == [r.hundredths for r in expected]
    assert (-cut[:, 1]).tolist() == pytest.approx([r.entropy for r in expected], abs=1e-4)
    assert (columns["fired"] == -1).all()


def test_text_before_the_image_is_read_as_a_whole_pass(subject: Subject) -> None:
    pairs = [(subject.queries[n], subject.items[n]) for n in range(3)]
    scorer = Scorer(subject.backbone, Scoring("mcq", text_first=True), 2)
    columns = scorer.read(pairs)
    tokens = [token for _, token, _ in scorer.labels]
    for n, (query, item) in enumerate(pairs):
        question = f"\n{framing_by_name('mcq').of_caption}"
        assert item.image is not None
        logits = turn_logits(subject.backbone, [f"Caption: {query.text}\n", item.image, question])
        assert columns["labels"][n].tolist() == pytest.approx(logits[tokens].tolist(), abs=1e-4)
    usual = Scorer(subject.backbone, Scoring("mcq"), 2).read(pairs)
    assert np.abs(usual["margin"] - columns["margin"]).min() > 1e-3


def test_label_sets_read_some_of_the_labels(tiny: Backbone, subject: Subject) -> None:
    pairs = [(subject.queries[0], item) for item in subject.items[:4]]
    scorer = Scorer(tiny, Scoring("true_false"), 4)
    columns = scorer.read(pairs)
    variants = [(word, value) for word, _, value in scorer.labels]
    for labels, words in (("plain", ("True", "False")), ("space", (" True", " False"))):
        found = keys_of(columns, variants, scorer.framing, order="margin", labels=labels)
        yes, no = (tiny.tokenizer.encode(word, add_special_tokens=False) for word in words)
        assert len(yes) == len(no) == 1
        for n, (query, item) in enumerate(pairs):
            assert item.image is not None
            question = FRAMINGS["true_false"].question(str(query.text))
            logits = turn_logits(tiny, [item.image, question])
            assert found[n, 0] == pytest.approx(float(logits[yes[0]] - logits[no[0]]), abs=1e-4)
    with pytest.raises(ConfigError, match=r"labels 'lower' of true_false are not single tokens"):
        keys_of(columns, variants, scorer.framing, order="margin", labels="lower")


def test_the_trigger_fires_after_the_first_layer_that_is_unsure(
    tiny: Backbone, subject: Subject
) -> None:
    pairs = [(subject.queries[n], subject.items[n % 4]) for n in range(8)]
    doubts = [_doubts(tiny, query, item) for query, item in pairs]
    threshold = float(np.median([max(of_pair[1:4]) for of_pair in doubts]))
    enhancement = EnhancementConfig(mode="dynamic", threshold=threshold)
    scorer = Scorer(tiny, Scoring("true_false", enhancement=enhancement), 3)
    fired = scorer.read(pairs)["fired"]
    asked = scorer.passes.asked
    scorer.close()
    expected = [next((n for n in asked if of_pair[n] > threshold), -1) for of_pair in doubts]
    assert fired.tolist() == expected
    assert len(set(expected)) > 1
    counted = Counter(expected)
    told = histogram(fired, asked)
    assert told == {**{str(n): counted[n] for n in asked}, "never": counted[-1]}
    assert sum(told.values()) == 8


def _doubts(backbone: Backbone, query: Item, item: Item) -> list[float]:
    """What each layer would say: entropy of its ten likeliest tokens as a share of ln 10, by output_hidden_states."""
    assert item.image is not None
    inputs = turn_inputs(backbone, [item.image, FRAMINGS["true_false"].question(str(query.text))])
    with torch.no_grad():
        places = written_out_positions(backbone, inputs, 0)
        output = backbone.model(**inputs, position_ids=places, output_hidden_states=True)
        states = output.hidden_states[1:]
        head, norm = backbone.model.get_output_embeddings(), backbone.decoder.norm
        found = []
        for number, state in enumerate(states):
            last = state[0, -1]
            logits = head(last if number == len(states) - 1 else norm(last))
            p = logits.sort(descending=True).values[:10].double().softmax(0).tolist()
            found.append(-sum(x * math.log(x) for x in p if x > 0) / math.log(10))
    return found


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring("true_false"),
        Scoring("mcq", text_first=True),
        Scoring("true_false", enhancement=EnhancementConfig(mode="dynamic", positions="all")),
        Scoring("true_false", enhancement=EnhancementConfig(mode="static", positions="all")),
    ],
    ids=["image first", "text first", "whole", "static"],
)
def test_the_cost_of_a_row_is_that_of_one_call(
    subject: Subject, tmp_path: Path, scoring: Scoring
) -> None:
    reader, pairs = Reader(subject, tmp_path, batch_size=4), subject.candidates(3)[:20]
    scorer = reader.scorer(scoring)
    for part in (pairs[:7], pairs):  # in two parts, so that images come twice
        reader.read("row", scorer, part)
    fresh = Scorer(subject.backbone, scoring, 4)
    fresh.read(reader.items(pairs))
    counts, cost = fresh.passes.counts, reader.cost(scoring, pairs)
    scorer.close()
    fresh.close()
    found = (cost.vision_passes, cost.prefix_tokens, cost.suffix_tokens)
    assert found == (counts.vision_passes, counts.prefix_tokens, counts.suffix_tokens)
    assert scorer.passes.counts.vision_passes == counts.vision_passes  # once, in two parts


def test_images_are_shared_between_ways_to_put_the_question(
    subject: Subject, tmp_path: Path
) -> None:
    reader, pairs = Reader(subject, tmp_path, batch_size=4), subject.candidates(3)[:12]
    ways = [
        Scoring("true_false"),
        Scoring("mcq"),
        Scoring("mcq", text_first=True),
        Scoring("mcq", enhancement=EnhancementConfig(mode="static")),
        Scoring("mcq", enhancement=EnhancementConfig(mode="static", positions="all")),
    ]
    seen, opened = [], []
    for scoring in ways:
        scorer, alone = reader.scorer(scoring), Scorer(subject.backbone, scoring, 4)
        reader.read("row", scorer, pairs)
        expected = alone.read(reader.items(pairs))
        for name, column in reader.readings(scoring).at(pairs).items():
            np.testing.assert_allclose(column, expected[name], atol=1e-4)
        seen.append(scorer.passes.counts.vision_passes)
        opened.append(scorer.passes.counts.prefix_tokens)
        scorer.close()
        alone.close()
    images = len(np.unique(pairs[:, 1]))
    assert seen == [images, 0, 0, 0, 0]
    assert [count > 0 for count in opened] == [True, False, True, False, True]


# From keys to figures


def test_ranks_order_as_tuples_do() -> None:
    rng = np.random.default_rng(2)
    keys = rng.integers(-2, 3, (40, 3)).astype(np.float64)
    keys[3] = keys[7]
    keys[5, 1] = np.nan
    rows = [tuple(-math.inf if math.isnan(x) else x for x in row) for row in keys.tolist()]
    found = ranks(keys)
    for (n, one), (m, other) in itertools.product(enumerate(rows), repeat=2):
        assert (found[n] < found[m]) == (one < other)
        assert (found[n] == found[m]) == (one == other)


def test_a_query_hits_only_where_its_best_is_right_and_alone() -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 3, (60, 4, 2)).astype(np.float64)
    relevant = rng.random((60, 4)) < 0.3
    expected = []
    for of_query, right in zip(keys.tolist(), relevant.tolist(), strict=True):
        best = max(map(tuple, of_query))
        at_best = [r for key, r in zip(of_query, right, strict=True) if tuple(key) == best]
        expected.append(float(all(at_best)))
    assert first_hits(keys, relevant).tolist() == expected
    assert 0 < sum(expected) < 60


def test_ties_of_the_best_are_counted_and_no_others() -> None:
    assert tied_share(np.array([[2.0, 1, 1], [2, 2, 0], [0, 0, 0], [3, 2, 1]])) == 0.5


def test_pairs_count_as_winoground_does() -> None:
    rng = np.random.default_rng(4)
    scores = rng.integers(0, 4, (50, 2, 2))
    texts, images, choices = [], [], {"i": 0, "t": 0}
    for (aa, ab), (ba, bb) in scores.tolist():  # of image and caption
        image_a, image_b, text_a, text_b = aa > ab, bb > ba, aa > ba, bb > ab
        choices["i"] += image_a + image_b
        choices["t"] += text_a + text_b
        texts.append(image_a and image_b)
        images.append(text_a and text_b)
    found = pair_report(both_orders(scores))
    values = {name: one["value"] for name, one in found.items()}
    assert values == pytest.approx(
        {
            "image_to_text": choices["i"] / 100,
            "text_to_image": choices["t"] / 100,
            "text_group": sum(texts) / 50,
            "image_group": sum(images) / 50,
            "group": sum(t and i for t, i in zip(texts, images, strict=True)) / 50,
        }
    )
    assert len(set(values.values())) > 2
    for one in found.values():
        assert one["n"] == 50
        assert one["interval"][0] <= one["value"] <= one["interval"][1]


# Side by side


def test_options_side_by_side_are_those_of_compare(tiny: Backbone, subject: Subject) -> None:
    questions = [(subject.queries[n], subject.items[n : n + 3]) for n in range(3)]
    said = compared(Scorer(tiny, Scoring("true_false"), 4), tiny, questions)
    assert said.shape == (3, 3, 3)
    for mean, question in zip(means(said), questions, strict=True):
        expected = Reranker(tiny).compare(*question)
        assert mean.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    for count in (27, 30):
        with pytest.raises(ConfigError, match=rf"{count} candidates cannot stand side by side"):
            option_tokens(tiny, count)


def test_side_by_side_is_told_with_what_it_costs_alone(subject: Subject, tmp_path: Path) -> None:
    bench, row = Bench(subject, tmp_path, batch_size=8), ROWS["listwise"]
    bench.measure([ROWS["default"], row])  # which has seen the images before
    found = bench.finished(row)
    assert found is not None
    scorer, best = Scorer(subject.backbone, Scoring("true_false"), 8), subject.best(DEPTH)
    questions = [
        (query, [subject.items[n] for n in of_query])
        for query, of_query in zip(subject.queries, best, strict=True)
    ]
    scores = means(compared(scorer, subject.backbone, questions))
    counts = scorer.passes.counts
    for name in ("vision_passes", "prefix_tokens", "suffix_tokens"):
        assert found["cost"][name] == getattr(counts, name) > 0
    winners = best[np.arange(len(best)), scores.argmax(1)]
    assert found["first"] == (winners == subject.own).astype(int).tolist()


def test_the_right_option_is_looked_for_at_both_places(tiny: Backbone, subject: Subject) -> None:
    questions = pair_questions(subject)
    scorer = Scorer(tiny, Scoring("true_false"), 8)
    said = {name: compared(scorer, tiny, of_side) for name, of_side in questions.items()}
    report = position_report(said)
    letters = [tiny.tokenizer.encode(name, add_special_tokens=False)[0] for name in "AB"]
    right: dict[str, list[bool]] = {"option_1": [], "option_2": []}
    for image, caption in [(s, s) for pair in subject.pairs for s in pair]:
        partner = image ^ 1
        texts = [caption_of(subject, caption), caption_of(subject, partner)]
        shown = subject.items[subject.own[image]].image
        assert shown is not None
        for place, name in enumerate(("option_1", "option_2")):
            a, b = texts if place == 0 else texts[::-1]
            asked = f"Query: the image above\nA: {a}\nB: {b}\n"
            asked += "Which candidate matches the query best? Answer with its letter."
            logits = turn_logits(tiny, [shown, asked])[letters].tolist()
            right[name].append(logits[place] > logits[1 - place])
    told = report["position"]["image_to_text"]
    for name, of_place in right.items():
        assert told[name]["value"] == pytest.approx(np.mean(of_place))
        assert told[name]["n"] == 6
    assert report["image_to_text"]["value"] == pytest.approx(told["averaged"]["value"])


def test_places_are_told_apart_and_averaged() -> None:
    # the first option is always liked more, but the right one much more where it stands there
    log = np.log(np.array([[[0.9, 0.1], [0.6, 0.4]]], np.float32))
    said = {name: np.repeat(log, 2, axis=0) for name in ("image_to_text", "text_to_image")}
    report = position_report(said)
    told = report["position"]["text_to_image"]
    assert (told["option_1"]["value"], told["option_2"]["value"]) == (1.0, 0.0)
    assert told["averaged"]["value"] == report["group"]["value"] == 1.0


# Nothing twice


def test_rows_that_only_reorder_read_nothing(subject: Subject, tmp_path: Path) -> None:
    bench = Bench(subject, tmp_path, batch_size=8)
    bench.measure([ROWS["coarse"]])
    assert bench.reader.num_read == 0
    bench.measure([ROWS["default"]])
    needed = {tuple(pair) for pair in subject.needed(DEPTH).tolist()}
    assert bench.reader.num_read == len(needed)
    assert len(needed) < len(subject.needed(DEPTH))  # hard pairs are candidates, too
    reordered = ["probability", "hundredths", "entropy", "labels-plain", "labels-space"]
    bench.measure([ROWS[name] for name in reordered])
    assert bench.reader.num_read == len(needed)
    assert all(bench.finished(ROWS[name]) is not None for name in reordered)
    bench.measure([ROWS["depth-5"]])
    deeper = needed | {tuple(pair) for pair in subject.candidates(5).tolist()}
    assert bench.reader.num_read == len(deeper)
    bench.measure([ROWS["mcq"]])
    assert bench.reader.num_read == len(deeper) + len(needed)


def test_what_was_read_before_an_interruption_is_not_read_again(
    subject: Subject, tmp_path: Path
) -> None:
    scoring, pairs = Scoring("mcq"), subject.candidates(3)
    first = Reader(subject, tmp_path, batch_size=8)
    first.read("row", first.scorer(scoring), pairs[:10])
    second = Reader(subject, tmp_path, batch_size=8)
    second.read("row", second.scorer(scoring), pairs)
    assert (first.num_read, second.num_read) == (10, len(pairs) - 10)
    whole = Scorer(subject.backbone, scoring, 8).read(second.items(pairs))
    for name, column in second.readings(scoring).at(pairs).items():
        np.testing.assert_allclose(column, whole[name], atol=1e-4)
    with pytest.raises(KeyError, match="pairs have not been read"):
        second.readings(scoring).at(subject.candidates(6))


def test_damaged_and_foreign_readings_are_read_anew(tmp_path: Path) -> None:
    readings, path = Readings(3, 3), tmp_path / "one.safetensors"
    pairs = np.array([[0, 1], [2, 2]])
    readings.add(pairs, {"margin": np.array([1.5, -2.0], np.float32)})
    readings.save(path, {"of": "this"})

    def kept(identity: Any) -> int:
        found = Readings(3, 3)
        found.load(path, identity)
        return len(found)

    assert kept({"of": "this"}) == 2
    assert kept({"of": "that"}) == 0
    path.write_bytes(path.read_bytes()[:-3])
    assert kept({"of": "this"}) == 0


def test_missing_pairs_come_once_by_image() -> None:
    readings = Readings(4, 4)
    readings.add(np.array([[1, 1]]), {"margin": np.zeros(1, np.float32)})
    wanted = np.array([[3, 2], [0, 2], [1, 1], [2, 0], [0, 2]])
    assert readings.missing(wanted).tolist() == [[2, 0], [0, 2], [3, 2]]


def test_finished_rows_are_kept_with_what_they_depend_on(subject: Subject, tmp_path: Path) -> None:
    row = ROWS["default"]
    bench = Bench(subject, tmp_path, batch_size=8)
    bench.measure([row])
    expected = bench.finished(row)
    again = Bench(subject, tmp_path, batch_size=8)
    (tmp_path / "scores" / f"{row.scoring.name}.safetensors").unlink()  # type: ignore[union-attr]
    again.measure([row])  # the row alone is enough
    assert again.reader.num_read == 0
    assert again.finished(row) == expected
    assert again.finished(rows_of("true_false", DEPTH + 1, 6)[1]) is None
    other = {**subject.identity, "queries": []}
    changed = Subject(**{**vars(subject), "identity": other})
    assert Bench(changed, tmp_path).finished(row) is None


def test_a_row_that_the_model_cannot_carry_is_told(subject: Subject, tmp_path: Path) -> None:
    bench, row = Bench(subject, tmp_path), ROWS["labels-lower"]
    bench.measure([row])
    assert bench.reader.num_read == 0
    found = bench.finished(row)
    assert found is not None
    assert "are not single tokens on both sides" in found["problem"]
    bench.measure([ROWS["default"]])
    default = bench.finished(ROWS["default"])
    assert default is not None
    text = markdown(summary([default, found], "true_false"))
    assert "- labels-lower: not measured, the labels 'lower'" in text


# The rows and the tables


def test_names_of_rows_and_files_are_their_own() -> None:
    rows = rows_of("true_false", 5, 6)
    assert len({row.name for row in rows}) == len({row.says for row in rows}) == len(rows)
    scorings = {row.scoring for row in rows if row.scoring is not None}
    assert len({scoring.name for scoring in scorings}) == len(scorings) == 20
    assert {row.depth for row in rows if row.group == "depth"} == {10, 20, 50}
    layers = [row.scoring.enhancement.layer for row in rows[:-1] if row.scoring]
    assert set(layers) == {None, 0, 1, 2, 3, 4, 5}


def result(name: str, first: NDArray[np.int64], **more: Any) -> dict[str, Any]:
    half = len(first) // 2
    shares = {
        kind: {"value": float(part.mean()), "interval": [part.mean() - 0.1, part.mean() + 0.1], "n": half}
        for kind, part in (("explicit", first[:half]), ("knowledge", first[half:]))
    }  # fmt: skip
    group = {"value": 0.5, "interval": [0.4, 0.6], "n": half}
    pairs = dict.fromkeys(("image_to_text", "text_to_image", "group"), group)
    cost = {"prefix_tokens": 1000, "suffix_tokens": 234, "vision_passes": 7}
    told = {"name": name, "group": "", "says": name, "num_pairs": 40, "cost": cost, "pairs": pairs}
    return {**told, "hits": shares, "first": first.tolist(), **more}


def test_the_summary_compares_with_the_default_and_decides_between_framings() -> None:
    rng = np.random.default_rng(5)
    firsts = {name: (rng.random(80) < p).astype(np.int64) for name, p in
              {"coarse": 0.2, "default": 0.8, "mcq": 0.95, "yes_no": 0.5}.items()}  # fmt: skip
    results = [result(name, first) for name, first in firsts.items()]
    found = summary(results, "true_false")
    rows = {row["name"]: row for row in found["rows"]}
    assert "p" not in rows["default"]
    assert "first" not in rows["mcq"]
    mcq, default = firsts["mcq"].astype(float), firsts["default"].astype(float)
    expected = {
        "explicit": paired_permutation(mcq[:40], default[:40]),
        "knowledge": paired_permutation(mcq[40:], default[40:]),
        "both": paired_permutation(mcq, default),
    }
    assert rows["mcq"]["p"] == expected
    assert found["framing"]["best"] == "mcq"
    assert found["framing"]["p"]["mcq"] == expected["both"]
    assert found["framing"]["hit@1"]["true_false"] == default.mean()
    for kind, one in found["fine_against_coarse"].items():
        assert one["intervals_apart"] == (
            rows["default"]["hits"][kind]["value"] - rows["coarse"]["hits"][kind]["value"] > 0.2
        )
    text = markdown(found)
    assert "Most hits: mcq." in text
    assert f"| mcq | {100 * mcq[:40].mean():.1f} (" in text
    assert "| 40 | 1,234 | 7 |" in text


# The command


def test_a_missing_adapter_says_what_to_run(tmp_path: Path) -> None:
    arguments = [word for setting in places(tmp_path) for word in ("--set", setting)]
    with pytest.raises(ArtifactError, match=r"run `slq demo`, or `slq train`"):
        run([*arguments, "--out", str(tmp_path / "out"), "--scenes", "4"])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_rows_and_pairs_without_an_adapter(tmp_path: Path) -> None:
    arguments = [word for setting in places(tmp_path) for word in ("--set", setting)]
    told = run([*arguments, "--scenes", "4", "--dry-run"])
    rows = {row["row"]: row for row in told["rows"]}
    assert list(rows) == [row.name for row in rows_of("mcq", 5, 6)]
    assert told["num_queries"] == 8
    assert (rows["default"]["pairs"], rows["default"]["new"]) == (40, 40 + 8)
    assert (rows["entropy"]["pairs"], rows["entropy"]["new"]) == (40, 0)
    assert (rows["depth-20"]["pairs"], rows["depth-20"]["new"]) == (160, 80)
    assert told["new_pairs_at_most"] == sum(row["new"] for row in rows.values())
    few = run([*arguments, "--scenes", "4", "--dry-run", "--only", "static-*", "framing"])
    names = [row["row"] for row in few["rows"]]
    assert names[:2] == ["coarse", "default"]
    assert set(names[2:]) == {n for n in rows if n.startswith("static-")} | {
        "true_false",
        "rate",
        "yes_no",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nonsense"], r"--only nonsense matches no row; there are coarse, default"),
        (["--scenes", "3"], r"--scenes 3 must be an even number"),
        (["--set", "data.scenes=null", "--set", "data.corpus=a.parquet"], r"with data\.scenes"),
    ],
)
def test_options_without_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run([*options, "--dry-run"])


def test_the_command_writes_tables_and_goes_on_with_further_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_adapter(tmp_path)
    arguments = [word for setting in places(tmp_path) for word in ("--set", setting)]
    arguments += ["--scenes", "4", "--out", str(tmp_path / "out"), "--repeats", "1"]
    first = run([*arguments, "--only", "hundredths", "kept"])
    assert [row["name"] for row in first["rows"]] == ["coarse", "default", "hundredths"]
    kept = first["kept"]
    assert [kept[level]["cost"]["vision_passes"] > 0 for level in kept] == [True, False, False]
    assert [kept[level]["cost"]["prefix_tokens"] > 0 for level in kept] == [True, True, False]
    assert 0 == kept["nothing"]["kept_bytes"] < kept["vision"]["kept_bytes"]
    assert kept["vision"]["kept_bytes"] < kept["prefix"]["kept_bytes"]
    assert "ETA of all rows" in capsys.readouterr().err
    second = run([*arguments, "--only", "entropy"])
    assert [row["name"] for row in second["rows"]][2:] == ["hundredths", "entropy"]
    assert second["rows"][:3] == first["rows"]
    assert "ETA" not in capsys.readouterr().err  # nothing was read
    stored = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert stored == json.loads(json.dumps(second))
    text = (tmp_path / "out" / "ablations.md").read_text()
    assert "cut to two decimals" in text
    assert text.index("| nothing | ") < text.index("| vision | ") < text.index("| prefix | ")
    assert (tmp_path / "out" / "ablations.png").read_bytes()[:4] == b"\x89PNG"
