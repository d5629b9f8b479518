"""The fine stage: pairs through whole passes, one at a time, against shared prefixes and what is kept of candidates.

The slow side is a fair one: it multiplies no more of the language-model head than ours, keeps no graph, and prepares
each image once. Scores and orders of all sides are compared.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.bench.measure import hardware, interleaved, medians
from jobs.bench.shapes import ON_CPU, Shape
from pipelines.progress import duration, show
from slq.backbones.base import Backbone, Prompt
from slq.enhancement import EnhancementConfig
from slq.errors import HardwareError
from slq.reranker import Reranker
from slq.reranking.layout import lay_out
from slq.reranking.passes import Counts, Passes
from slq.schema import Item

SIZES = (5, 32, 100)
_KEPT_BYTES = 2**36  # room for everything
_FRAMING = "true_false"  # the shortest question: some 20 tokens of most tokenizers follow a caption
_WORDS = ("red", "blue", "small", "dog", "cat", "tree", "left", "right", "above", "two", "three")
_RATIOS = {
    "image_to_text": (("one_at_a_time", "shared"),),
    "text_to_image": (
        ("one_at_a_time", "nothing_kept"),
        ("nothing_kept", "all_missed"),
        ("nothing_kept", "vision_kept"),
        ("nothing_kept", "prefix_kept"),
    ),
}
"""Slow over fast, by direction."""
_KEPT = {
    "one_at_a_time": "one",
    "shared": "nothing",
    "nothing_kept": "nothing",
    "all_missed": "nothing",
    "vision_kept": "vision",
    "prefix_kept": "prefix",
}
"""What each side has before it runs."""


@dataclass(frozen=True)
class Side:
    """One way to score the same pairs.

    Attributes:
        score: Gives margins.
        counts: What its passes have cost so far.
    """

    score: Callable[[], Tensor]
    counts: Callable[[], Counts]


class OneAtATime:
    """Whole passes, each of one pair, without anything kept.

    Args:
        reranker: Says how a pair is put to the model, and reads the answer.
    """

    def __init__(self, reranker: Reranker) -> None:
        self._reranker = reranker
        self._passes = Passes(reranker.backbone, EnhancementConfig())
        self.counts = Counts()
        self._openings: dict[int, Prompt] = {}

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Item, Item]]) -> Tensor:
        """Margins of pairs, (n,) float32."""
        self._openings.clear()
        return torch.cat([self._one(*pair) for pair in pairs])

    def _one(self, query: Item, candidate: Item) -> Tensor:
        backbone = self._reranker.backbone
        layout = lay_out(self._reranker.framing, query, candidate)
        name = id(layout.shared)
        if name not in self._openings:
            (self._openings[name],) = backbone.tokenised([Item(image=layout.shared)], close=False)
        opened, suffix = self._openings[name], self._passes.suffix(layout, [])
        whole = Prompt([*opened.ids, *suffix.prompt.ids], opened.vision)
        self.counts += Counts(
            vision_passes=1, prefix_tokens=len(opened), suffix_tokens=len(suffix.prompt)
        )
        answer = backbone.last_states(backbone.collate([whole]))
        return self._reranker.margins(answer).cpu()


def pairs_of(shape: Shape, direction: str, count: int) -> list[tuple[Item, Item]]:
    """A query and its candidates: images of the shape's visual tokens, captions of a fixed number of words."""
    rng, words = np.random.default_rng(7), random.Random(7)
    side = shape.side

    def image() -> Item:
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        return Item(image=picture)

    def caption() -> Item:
        return Item(text=" ".join(words.choices(_WORDS, k=6)))

    if direction == "image_to_text":
        query = image()
        return [(query, caption()) for _ in range(count)]
    query = caption()
    return [(query, image()) for _ in range(count)]


def sides_of(
    backbone: Backbone, pairs: Sequence[tuple[Item, Item]], direction: str
) -> dict[str, Side]:
    """All ways to score these pairs."""

    def ours(*, fresh: bool, vision: int = 0, prefix: int = 0) -> Side:
        def made() -> Reranker:
            return Reranker(backbone, framing=_FRAMING, vision_bytes=vision, prefix_bytes=prefix)

        rerankers = [made()]
        if not fresh:
            rerankers[-1].score(pairs)  # what is kept is there before the clock runs

        def score() -> Tensor:
            if fresh:
                rerankers[:] = [made()]  # what the one before kept is gone
            return rerankers[-1].score(pairs)

        return Side(score, lambda: rerankers[-1].counts)

    slow = OneAtATime(Reranker(backbone, framing=_FRAMING))
    found = {"one_at_a_time": Side(lambda: slow.score(pairs), lambda: slow.counts)}
    if direction == "image_to_text":
        return {**found, "shared": ours(fresh=True)}
    return {
        **found,
        "nothing_kept": ours(fresh=True),
        "all_missed": ours(fresh=True, vision=_KEPT_BYTES, prefix=_KEPT_BYTES),
        "vision_kept": ours(fresh=False, vision=_KEPT_BYTES),
        "prefix_kept": ours(fresh=False, vision=_KEPT_BYTES, prefix=_KEPT_BYTES),
    }


def planned(backbone: Backbone, pairs: Sequence[tuple[Item, Item]], *, kept: str) -> Counts:
    """What the passes of one run must cost, from the lengths of sequences.

    Args:
        backbone: Makes the tokens.
        pairs: With one image each.
        kept: `nothing`, `vision` or `prefix`; `one` where each pair runs on its own.
    """
    reranker = Reranker(backbone, framing=_FRAMING)
    layouts = [lay_out(reranker.framing, *pair) for pair in pairs]
    images = {
        number if kept == "one" else id(layout.shared): layout.shared
        for number, layout in enumerate(layouts)
    }
    openings = backbone.tokenised([Item(image=image) for image in images.values()], close=False)
    return Counts(
        vision_passes=len(images) if kept in ("one", "nothing") else 0,
        prefix_tokens=0 if kept == "prefix" else sum(map(len, openings)),
        suffix_tokens=sum(len(reranker.passes.suffix(layout, []).prompt) for layout in layouts),
    )


def measure(
    backbone: Backbone,
    pairs: Sequence[tuple[Item, Item]],
    direction: str,
    repeats: int,
    *,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Ratios, seconds and counts of ways to score pairs.

    Args:
        backbone: That scores.
        pairs: One query with its candidates.
        direction: Of `image_to_text` and `text_to_image`.
        repeats: Measured rounds.
        only: Sides that are timed; all by default. Scores are compared with those of whole passes in any case.
    """
    sides = sides_of(backbone, pairs, direction)
    scores: dict[str, Tensor] = {}
    costs: dict[str, dict[str, int]] = {}
    for name, side in sides.items():  # this is the round that is not measured, too
        before = side.counts() if name.endswith("kept") and name != "nothing_kept" else Counts()
        scores[name] = side.score()
        after = asdict(side.counts())
        costs[name] = {key: value - asdict(before)[key] for key, value in after.items()}
    times = interleaved(
        {name: side.score for name, side in sides.items() if not only or name in only},
        repeats=repeats,
        device=backbone.device,
        warm_up=False,
    )
    slow = scores["one_at_a_time"]
    return {
        "ratios": {
            f"{a}/{b}": round(float(np.median(np.divide(times[a], times[b]))), 3)
            for a, b in _RATIOS[direction]
            if {a, b} <= times.keys()
        },
        "median_s": {name: round(value, 4) for name, value in medians(times).items()},
        "counts": costs,
        "planned": {
            name: {**asdict(planned(backbone, pairs, kept=kept)), "padded_tokens": 0}
            for name, kept in _KEPT.items()
            if name in sides
        },
        "largest_difference": max(float((found - slow).abs().max()) for found in scores.values()),
        "moved": sum(
            int(not torch.equal(found.argsort(stable=True), slow.argsort(stable=True)))
            for found in scores.values()
        ),
    }


def run(arguments: list[str]) -> dict[str, Any]:
    """Measure and return what `slq bench rerank` prints.

    Args:
        arguments: Of the command line, after the benchmark's name.

    Raises:
        HardwareError: A GPU is asked for that is not here.
    """
    parser = argparse.ArgumentParser(prog="slq bench rerank", description=__doc__)
    parser.add_argument(
        "--family", choices=sorted(ON_CPU), action="append", help="repeatable; all by default"
    )
    parser.add_argument("--direction", choices=sorted(_RATIOS), action="append", help="both")
    parser.add_argument("--candidates", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--side", choices=sorted(_KEPT), nargs="+", default=[], help="all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, all sides in each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise HardwareError(f"device {options.device!r} was asked for, but torch sees no CUDA GPU")
    found: dict[str, Any] = {
        "bench": "rerank",
        "hardware": hardware(torch.device(options.device)),
        "repeats": options.repeats,
    }
    for family in options.family or list(ON_CPU):
        shape = ON_CPU[family]
        backbone = shape.load(torch.float32, options.device)
        of_family: dict[str, Any] = {}
        for direction in options.direction or list(_RATIOS):
            for count in options.candidates:
                show(f"{family}: {direction.replace('_', ' ')}, {count} candidates")
                pairs = pairs_of(shape, direction, count)
                measured = measure(backbone, pairs, direction, options.repeats, only=options.side)
                of_family.setdefault(direction, {})[str(count)] = measured
                spent = sum(measured["median_s"].values()) * options.repeats
                show(f"  {measured['ratios']} ({duration(spent)})")
        found[family] = of_family
    return found
