"""Margins less those of pairs with an empty side, against the written-out formula in whole passes."""

import math
from typing import Any

import pytest
import torch
from PIL import Image

from slq.backbones.base import Backbone
from slq.errors import ConfigError
from slq.reranker import Reranker
from slq.reranking.context_free import ContextFree
from slq.schema import Item
from tests.families import BUILDERS, picture
from tests.naive import Content, chat_logits, turn_logits

FAMILIES = ["qwen3_vl", "qwen2_5_vl", "intern_vl"]
SIDES: list[ContextFree] = ["candidate", "query"]
RED, CAT = "a small red dog", "two blue cats"
GREY = Image.new("RGB", (224, 224), (127, 127, 127))
FRAMING = "true_false"
CAPTION = "Does the caption match the image? Answer True or False."
PAIR = "Does the candidate match the query? Answer True or False."


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return BUILDERS[request.param]()


def slow_margin(backbone: Backbone, *content: str | Image.Image) -> float:
    p = turn_logits(backbone, content).double().softmax(-1)
    masses = []
    for words in (("True", "true"), ("False", "false")):
        variants = [variant for word in words for variant in (word, f" {word}")]
        encoded = [backbone.tokenizer.encode(v, add_special_tokens=False) for v in variants]
        masses.append(sum(float(p[n]) for n in {ids[0] for ids in encoded if len(ids) == 1}))
    return math.log(masses[0] / masses[1])


IMAGE, OTHER, PHOTO = picture(2, 3, 1), picture(3, 2, 2), picture(2, 2, 3)

# A pair, and its turn as written with other words and images in the place of its own.
PAIRS: dict[str, tuple[tuple[Item, Item], Any]] = {
    "an image for a text": (
        (Item(text=RED), Item(image=IMAGE)),
        lambda q, c: (c or IMAGE, f"Caption: {q or RED}\n{CAPTION}"),
    ),
    "another image for the text": (
        (Item(text=RED), Item(image=OTHER)),
        lambda q, c: (c or OTHER, f"Caption: {q or RED}\n{CAPTION}"),
    ),
    "a text for an image": (
        (Item(image=PHOTO), Item(text=CAT)),
        lambda q, c: (q or PHOTO, f"Caption: {c or CAT}\n{CAPTION}"),
    ),
    "two texts": (
        (Item(text=RED), Item(text=CAT)),
        lambda q, c: (f"Query: {q or RED}\nCandidate: {c or CAT}\n{PAIR}",),
    ),
    "two images": (
        (Item(image=PHOTO), Item(image=IMAGE)),
        lambda q, c: (q or PHOTO, "Query: the image above\nCandidate: ", c or IMAGE, f"\n{PAIR}"),
    ),
    "a described image for a text": (
        (Item(text=RED), Item(text=CAT, image=OTHER)),
        lambda q, c: (
            c or OTHER,
            f"Query: {q or RED}\nCandidate: the image above and the text: {'N/A' if c else CAT}\n{PAIR}",
        ),
    ),
}


def empty_of(pair: tuple[Item, Item], side: ContextFree) -> str | Image.Image:
    return GREY if pair[side == "candidate"].image else "N/A"


def slow(backbone: Backbone, name: str, side: ContextFree) -> tuple[float, float]:
    """The margin of a pair alone, and that with one side empty."""
    pair, turn = PAIRS[name]
    less = (None, empty_of(pair, side)) if side == "candidate" else (empty_of(pair, side), None)
    return slow_margin(backbone, *turn(None, None)), slow_margin(backbone, *turn(*less))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("batch_size", "kept"), [(64, 0), (2, 2**30)])
def test_the_margin_of_the_pair_with_an_empty_side_is_subtracted(
    backbone: Backbone, side: ContextFree, batch_size: int, kept: int
) -> None:
    pairs = [pair for pair, _ in PAIRS.values()]
    reranker = Reranker(
        backbone, framing=FRAMING, context_free=side, batch_size=batch_size, prefix_bytes=kept
    )
    expected = [slow(backbone, name, side) for name in PAIRS]
    margins = [own - less for own, less in expected]
    for _ in range(2):
        assert reranker.score(pairs).tolist() == pytest.approx(margins, abs=1e-5)
    readings = reranker.read(pairs)
    assert [one.margin for one in readings] == pytest.approx(margins, abs=1e-5)
    assert [one.context_free for one in readings] == pytest.approx(
        [less for _, less in expected], abs=1e-5
    )
    masses = [one.label_mass for one in Reranker(backbone, framing=FRAMING).read(pairs)]
    assert [one.label_mass for one in readings] == pytest.approx(masses, abs=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_a_trained_reranker_is_shown_what_its_own_prompt_says_of_nothing(side: ContextFree) -> None:
    backbone = BUILDERS["qwen3_vl"]()
    judge = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruct = (
        "<Instruct>: Given a search query, retrieve relevant candidates that answer the query."
    )

    def difference(query: str, candidate: str) -> float:
        user: Content = [f"{instruct}<Query>:{query}\n<Document>:{candidate}"]
        logits = chat_logits(backbone, {"system": [judge], "user": user}).double()
        yes, no = (backbone.tokenizer.get_vocab()[word] for word in ("yes", "no"))
        return float(logits[yes] - logits[no])

    less = difference(RED, "NULL") if side == "candidate" else difference("NULL", CAT)
    reranker = Reranker(backbone, framing="qwen3_vl_reranker", context_free=side)
    found = reranker.score([(Item(text=RED), Item(text=CAT))])
    assert found.tolist() == pytest.approx([difference(RED, CAT) - less], abs=1e-5)


def images(count: int = 6) -> list[Item]:
    return [Item(image=picture(2 + n % 2, 2, 10 + n)) for n in range(count)]


def test_an_empty_candidate_keeps_the_order_of_a_kind_and_an_empty_query_orders_by_the_rest(
    backbone: Backbone,
) -> None:
    shown = images(12)
    plain = {
        one.index: one.fine_score for one in Reranker(backbone, framing=FRAMING).rank(RED, shown)
    }
    moved = Reranker(backbone, framing=FRAMING, context_free="candidate").rank(RED, shown)
    assert [one.index for one in moved] == list(plain)
    less = [float(plain[one.index] or 0) - float(one.fine_score or 0) for one in moved]
    assert less == pytest.approx([less[0]] * 12, abs=1e-5)
    freed = Reranker(backbone, framing=FRAMING, context_free="query").rank(RED, shown)
    nothing = [slow_margin(backbone, one.image or "", f"Caption: N/A\n{CAPTION}") for one in shown]
    rest = {n: float(plain[n] or 0) - nothing[n] for n in plain}
    assert [one.index for one in freed] == sorted(rest, key=lambda n: -rest[n])
    assert [one.index for one in freed] != list(plain)


@pytest.mark.parametrize("budget_s", [None, 1e9])
def test_an_empty_candidate_is_paid_once_for_a_query(
    backbone: Backbone, budget_s: float | None
) -> None:
    """In however many chunks a call runs."""
    plain, less = (
        Reranker(backbone, framing=FRAMING),
        Reranker(backbone, framing=FRAMING, context_free="candidate"),
    )
    for reranker in (plain, less):
        reranker.rank(RED, images(), budget_s=budget_s)
    assert less.counts.vision_passes == plain.counts.vision_passes + 1
    each = plain.counts.suffix_tokens // 6
    assert less.counts.suffix_tokens == plain.counts.suffix_tokens + each


@pytest.mark.parametrize("budget_s", [None, 1e9])
def test_an_empty_query_is_paid_once_for_a_candidate_whose_image_is_opened_once(
    backbone: Backbone, budget_s: float | None
) -> None:
    shown = images()
    plain, less = (
        Reranker(backbone, framing=FRAMING),
        Reranker(backbone, framing=FRAMING, context_free="query"),
    )
    for reranker in (plain, less):
        reranker.rank(RED, shown, budget_s=budget_s)
    assert less.counts.vision_passes == plain.counts.vision_passes
    assert less.counts.prefix_tokens == plain.counts.prefix_tokens
    question = backbone.token_ids(f"Caption: N/A\n{CAPTION}") + backbone.closing_ids
    assert less.counts.suffix_tokens == plain.counts.suffix_tokens + 6 * len(question)
    again = Reranker(backbone, framing=FRAMING, context_free="query")
    again.score([(Item(text=text), one) for text in (RED, CAT) for one in shown])
    both = Reranker(backbone, framing=FRAMING)
    both.score([(Item(text=text), one) for text in (RED, CAT) for one in shown])
    assert again.counts.suffix_tokens == both.counts.suffix_tokens + 6 * len(question)


def test_rank_read_and_score_tell_the_same(backbone: Backbone) -> None:
    shown = images()
    pairs = [(Item(text=RED), one) for one in shown]
    reranker = Reranker(backbone, framing=FRAMING, context_free="candidate")
    scores = reranker.score(pairs)
    for one in reranker.rank(RED, shown, details=True):
        assert one.reading is not None
        assert one.fine_score == one.reading.margin
        assert one.fine_score == pytest.approx(float(scores[one.index]), abs=1e-5)
        assert one.reading.context_free is not None
        assert one.reading.entropy is not None
    plain = Reranker(backbone, framing=FRAMING).score(pairs)
    raw = [one.margin + (one.context_free or 0) for one in reranker.read(pairs)]
    torch.testing.assert_close(torch.tensor(raw), plain, rtol=0, atol=1e-5)


def test_nothing_is_subtracted_unless_it_is_asked_for(backbone: Backbone) -> None:
    (reading,) = Reranker(backbone, framing=FRAMING).read([(Item(text=RED), Item(text=CAT))])
    assert reading.context_free is None


def test_a_profile_that_does_not_order_by_margins_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="profile 'compat' does not order by margins"):
        Reranker(backbone, framing=FRAMING, profile="compat", context_free="query")
