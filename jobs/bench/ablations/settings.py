"""What is varied: the ways to put a pair to the model, and the rows that rank by them (spec: RetLLM section 7)."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from slq.enhancement import EnhancementConfig
from slq.reranking.framings import FRAMINGS, framing_by_name

OFF = EnhancementConfig()
DEPTHS = (5, 10, 20, 50)
ALPHAS = (0.05, 0.12, 0.3)  # 0 is the row without enhancement
_ALPHA = ALPHAS[-1]  # the paper's
_UNSURE = 0.15  # for a model that is never as unsure as 0.75, the paper's


@dataclass(frozen=True)
class Scoring:
    """One way to put pairs to the model. Rows that share it share its scores.

    Attributes:
        framing: A key of `slq.reranking.framings.FRAMINGS`.
        text_first: Whether the image stands behind the caption and not before it.
        enhancement: Whether layers look at the image again.
    """

    framing: str
    text_first: bool = False
    enhancement: EnhancementConfig = OFF

    def identity(self) -> dict[str, Any]:
        """What its scores depend on, beside the model and the pairs."""
        framing = asdict(framing_by_name(self.framing))
        return {**asdict(self), "framing": framing, "enhancement": self.enhancement.model_dump()}

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.framing}-{digest(self.identity())[:12]}"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What `--only` and files call it.
        group: The rows among which it stands.
        says: What is different, in words.
        scoring: None ranks by coarse scores.
        depth: Candidates that are scored.
        order: A key of `jobs.bench.ablations.orders.ORDERS`: what scored candidates are sorted by.
        labels: A key of `jobs.bench.ablations.orders.LABELS`: which variants of the label words the margin reads.
        side_by_side: Whether the model sees all candidates at once.
    """

    name: str
    group: str
    says: str
    scoring: Scoring | None
    depth: int
    order: str = "margin"
    labels: str = "all"
    side_by_side: bool = False

    def identity(self) -> dict[str, Any]:
        """What its figures depend on, beside the subject."""
        scoring = None if self.scoring is None else self.scoring.identity()
        return {**asdict(self), "scoring": scoring}


def rows_of(framing: str, depth: int, num_layers: int) -> tuple[Row, ...]:
    """All rows; the second one is the default, with which the others are compared.

    Args:
        framing: Of the default.
        depth: Of the default.
        num_layers: Of the language model.
    """
    default = Row("default", "", f"default: {framing}, depth {depth}", Scoring(framing), depth)
    return (
        replace(default, name="coarse", says="coarse alone", scoring=None, depth=0),
        default,
        *_readings(default),
        *_framings(default),
        *_depths(default),
        *_static(default, num_layers),
        *_dynamic(default),
        replace(
            default,
            name="listwise",
            group="side by side",
            says="all candidates in one prompt",
            side_by_side=True,
        ),
    )


def _readings(default: Row) -> Iterator[Row]:
    """Rows that read the default's own logits in another way."""
    orders = {
        "probability": "P(positive) over the vocabulary",
        "hundredths": "cut to two decimals, ties by coarse score",
        "entropy": "cut to two decimals, ties by entropy (compat)",
    }
    for order, says in orders.items():
        yield replace(default, name=order, group="truncation and ties", says=says, order=order)
    labels = {
        "plain": "labels as they begin an answer",
        "space": "labels behind a space",
        "lower": "labels in lower case",
    }
    for name, says in labels.items():
        yield replace(default, name=f"labels-{name}", group="label set", says=says, labels=name)


def _framings(default: Row) -> Iterator[Row]:
    assert default.scoring is not None
    for name in sorted(FRAMINGS):
        if name != default.scoring.framing:
            yield replace(default, name=name, group="framing", says=name, scoring=Scoring(name))
    yield replace(
        default,
        name="text-first",
        group="order",
        says="text before the image",
        scoring=replace(default.scoring, text_first=True),
    )


def _depths(default: Row) -> Iterator[Row]:
    for depth in DEPTHS:
        if depth != default.depth:
            says = f"depth {depth}"
            yield replace(default, name=f"depth-{depth}", group="depth", says=says, depth=depth)


def _static(default: Row, num_layers: int) -> Iterator[Row]:
    """A sweep over layers at the paper's share, then shares and positions at the layer that is usual."""
    usual = round(num_layers / 4)
    for layer in range(num_layers):
        yield _enhanced(default, f"static-{layer}", mode="static", layer=layer, alpha=_ALPHA)
    for alpha in ALPHAS[:-1]:
        name = f"static-{usual}-alpha-{alpha}"
        yield _enhanced(default, name, mode="static", layer=usual, alpha=alpha)
    for positions in ("after_image", "all"):
        name = f"static-{usual}-{positions}"
        chosen = {"alpha": _ALPHA, "positions": positions}
        yield _enhanced(default, name, mode="static", layer=usual, **chosen)


def _dynamic(default: Row) -> Iterator[Row]:
    yield _enhanced(default, "dynamic", mode="dynamic", alpha=_ALPHA)
    for alpha in ALPHAS:
        name = f"dynamic-{_UNSURE}" + ("" if alpha == _ALPHA else f"-alpha-{alpha}")
        yield _enhanced(default, name, mode="dynamic", alpha=alpha, threshold=_UNSURE)
    name = f"dynamic-{_UNSURE}-all"
    chosen = {"alpha": _ALPHA, "threshold": _UNSURE, "positions": "all"}
    yield _enhanced(default, name, mode="dynamic", **chosen)


def _enhanced(default: Row, name: str, **changed: Any) -> Row:
    assert default.scoring is not None
    enhancement = EnhancementConfig.model_validate(changed)
    where = f"layer {enhancement.layer}"
    if enhancement.mode == "dynamic":
        where = f"threshold {enhancement.threshold}"
    told = {"answer": "", "after_image": ", all behind the image", "all": ", all positions"}
    says = f"{enhancement.mode}, {where}, alpha {enhancement.alpha}{told[enhancement.positions]}"
    scoring = replace(default.scoring, enhancement=enhancement)
    return replace(default, name=name, group="visual enhancement", says=says, scoring=scoring)


def digest(value: Any) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
