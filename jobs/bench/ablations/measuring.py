"""The figures of one row."""

from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.bench.ablations.listwise import compared, means, pair_questions, position_report
from jobs.bench.ablations.orders import (
    Columns,
    Floats,
    both_orders,
    first_hits,
    histogram,
    keys_of,
    label_columns,
    pair_report,
    ranks,
    share,
    tied_share,
)
from jobs.bench.ablations.reading import Reader
from jobs.bench.ablations.scores import Pairs, Scorer
from jobs.bench.ablations.settings import Row
from jobs.bench.ablations.subject import KINDS, Subject
from slq.reranking.passes import Counts

_ANSWERED = 0.5  # of the next token's probability, at least, on the labels


def measured(reader: Reader, row: Row) -> dict[str, Any]:
    """Everything that the table tells of a row.

    Returns:
        `hits`: hit@1 of each kind with its interval; `first`: of each query, 0 or 1; `pairs`: as of
        `jobs.bench.ablations.orders.pair_report`; `num_pairs` and `cost`: of ranking, as one call with nothing kept;
        `tied`: share of queries whose best score is tied; `answered`: share of pairs whose next token is a label more
        likely than not; `fired`: of a trigger, as of `jobs.bench.ablations.orders.histogram`.

    Raises:
        ConfigError: The model cannot carry the row.
    """
    if row.scoring is None:
        found, hits = _coarse(reader.subject)
    elif row.side_by_side:
        found, hits = _side_by_side(reader, row)
    else:
        found, hits = _one_by_one(reader, row)
    shares = {kind: share(hits[reader.subject.of_kind(kind)]) for kind in KINDS}
    return {"hits": shares, "first": hits.astype(int).tolist(), **found}


def _coarse(subject: Subject) -> tuple[dict[str, Any], Floats]:
    keys = subject.coarse[:, :, None].astype(np.float64)
    found = {
        "pairs": _pairs(_similarities(subject, subject.within_pairs())),
        "num_pairs": 0,
        "cost": asdict(Counts()),
    }
    return found, first_hits(keys, subject.relevant)


def _one_by_one(reader: Reader, row: Row) -> tuple[dict[str, Any], Floats]:
    assert row.scoring is not None
    subject = reader.subject
    ranked, within = subject.candidates(row.depth), subject.within_pairs()
    with closing(reader.scorer(row.scoring)) as scorer:
        label_columns(
            _variants(scorer), scorer.framing, row.labels
        )  # found before any work is done
        reader.read(row.name, scorer, subject.needed(row.depth))
    readings = reader.readings(row.scoring)
    columns, num_queries = readings.at(ranked), len(subject.queries)
    own = _keys(row, scorer, columns)
    keys = np.concatenate([own, _similarities(subject, ranked)], axis=1)
    of_pairs = [_keys(row, scorer, readings.at(within)), _similarities(subject, within)]
    found = {
        "pairs": _pairs(np.concatenate(of_pairs, axis=1)),
        "num_pairs": len(ranked),
        "cost": asdict(reader.cost(row.scoring, ranked)),
        "tied": tied_share(own[:, 0].reshape(num_queries, -1)),
        "answered": float((columns["label_mass"] >= _ANSWERED).mean()),
    }
    if row.scoring.enhancement.mode == "dynamic":
        found["fired"] = histogram(columns["fired"], scorer.passes.asked)
    relevant = subject.relevant[ranked[:, 0], ranked[:, 1]].reshape(num_queries, -1)
    return found, first_hits(keys.reshape(*relevant.shape, -1), relevant)


def _side_by_side(reader: Reader, row: Row) -> tuple[dict[str, Any], Floats]:
    assert row.scoring is not None
    subject, best = reader.subject, reader.subject.best(row.depth)
    depth = best.shape[1]
    questions = [
        (query, [subject.items[n] for n in candidates])
        for query, candidates in zip(subject.queries, best, strict=True)
    ]

    def tell(asked: int) -> None:
        reader.meter.tell(row.name, asked * depth**2, f"{asked} more queries")

    with closing(reader.scorer(row.scoring)) as scorer:
        said = compared(scorer, subject.backbone, questions, tell)
        cost = Counts(  # with nothing kept, though here images may be
            vision_passes=len(np.unique(best)),
            prefix_tokens=len(subject.backbone.plain_ids),
            suffix_tokens=scorer.passes.counts.suffix_tokens,
        )
        of_pairs = {
            direction: compared(scorer, subject.backbone, of_direction)
            for direction, of_direction in pair_questions(subject).items()
        }
    scores = means(said).astype(np.float64)
    coarse = np.take_along_axis(subject.coarse, best, axis=1)
    found = {
        "pairs": position_report(of_pairs),
        "num_pairs": best.size,
        "cost": asdict(cost),
        "tied": tied_share(scores),
    }
    relevant = np.take_along_axis(subject.relevant, best, axis=1)
    return found, first_hits(np.stack([scores, coarse], axis=-1), relevant)


def _keys(row: Row, scorer: Scorer, columns: Columns) -> Floats:
    chosen = {"order": row.order, "labels": row.labels}
    return keys_of(columns, _variants(scorer), scorer.framing, **chosen)


def _variants(scorer: Scorer) -> list[tuple[str, float]]:
    return [(word, value) for word, _, value in scorer.labels]


def _similarities(subject: Subject, pairs: Pairs) -> Floats:
    """(n, 1) cosines, the last thing that pairs are sorted by."""
    found: NDArray[Any] = subject.coarse[pairs[:, 0], pairs[:, 1]].astype(np.float64)
    return found[:, None]


def _pairs(keys: Floats) -> dict[str, Any]:
    """Figures of hard pairs from (pairs * 4, num_keys), in the order of `Subject.within_pairs`."""
    return pair_report(both_orders(ranks(keys).reshape(-1, 2, 2)))
