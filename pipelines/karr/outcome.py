"""From finished shards to the benchmark: people's decisions, captions that stand twice, the funnel, and all files."""

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.commits import errors_name, shard_name
from pipelines.karr.export import FOLDER, export
from pipelines.karr.review import FOLDER as REVIEW
from pipelines.karr.review import human_agreement, read_decisions, reviewed, write_sheet
from pipelines.karr.shards import ledger_of
from pipelines.karr.source import read_captions
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from slq.errors import DataError
from slq.files import write_json
from slq.karr.agreement import MISSING, agreement
from slq.karr.categories import CATEGORIES, CLUE_TYPES
from slq.karr.lexicon import Lexicon
from slq.karr.reasons import Funnel, funnel_markdown
from slq.karr.words import tokens

log = logging.getLogger(__name__)
FUNNEL, FUNNEL_TEXT = "funnel.json", "funnel.md"
Row = dict[str, Any]


def assemble(recipe: Recipe, ledger: Ledger) -> dict[str, Any]:
    """Write benchmark, review sheet and funnel, and tell what is in them.

    Raises:
        DataError: A review file breaks the rules, or captions are not all accounted for.
        StorageError: Something cannot be written.
    """
    section, folder = recipe.karr, recipe.storage.karr
    plan = read_captions(ledger.store)
    rows, failed = _finished(ledger)
    candidates = [row for row in rows if row["reason"] is None]
    known = {row["source_id"]: row for row in candidates}
    retired = frozenset(row["source_id"] for row in plan) - known.keys()
    decisions = read_decisions(folder / REVIEW, known, retired)
    judged = _without_twins(reviewed(candidates, decisions, section, Lexicon(section.wordnet)))
    outcome = {row["source_id"]: row["reason"] for row in (*rows, *judged)} | failed
    _require_same_ids(plan, outcome)
    funnel = Funnel.of(outcome.values())
    kept = [row for row in judged if row["reason"] is None]
    if not kept:
        log.warning("%s: no caption is left; %s says why", folder, FUNNEL_TEXT)
    notes = _notes(recipe)
    summary = {
        "folder": str(folder),
        "benchmark": str(folder / FOLDER),
        "review": str(folder / REVIEW),
        "funnel": funnel.to_json(),
        "categories": _shares(kept, "category", CATEGORIES),
        "clue_types": _shares(kept, "clue_type", CLUE_TYPES),
        "agreement": {
            "judges": _judges_agreement(rows, [judge.name for judge in section.judges]),
            "annotators": human_agreement(decisions),
        },
        "notes": notes,
    }
    write_sheet(folder / REVIEW, candidates)
    write_json(folder / FUNNEL, summary)
    ledger.store.write(FUNNEL_TEXT, _markdown(funnel, summary).encode())
    wanted = {row["item_id"] for row in kept} if section.gallery == "kept" else None
    places = {row["item_id"]: row["uri"] for row in rows if row["uri"] is not None}
    gallery = [(name, uri) for name, uri in places.items() if wanted is None or name in wanted]
    export(folder / FOLDER, kept, gallery, recipe.storage.retry_s)
    return summary


def finished_rows(recipe: Recipe) -> list[Row]:
    """Rows of all committed shards as they were made, before people decide; errors as `assemble`."""
    return _finished(ledger_of(recipe))[0]


def _finished(ledger: Ledger) -> tuple[list[Row], dict[str, str]]:
    """Rows of all shards in the order of the plan, and the reason of each caption that has no row, by its id."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for shard_id, commit in sorted(ledger.commits().items()):
        ledger.require_shard(commit)
        data = ledger.store.read(shard_name(shard_id, commit.generation))
        rows += pq.read_table(io.BytesIO(data)).to_pylist()
        if commit.quarantined:
            data = ledger.store.read(errors_name(shard_id, commit.generation))
            errors = pq.read_table(io.BytesIO(data)).to_pylist()
            failed |= {row["id"]: row["error"] for row in errors}
    return rows, failed


def _without_twins(rows: Sequence[Row]) -> list[Row]:
    """The rows, with those rejected whose words also stand with another image: none of them has one answer."""
    images: dict[str, set[str]] = {}
    for row in rows:
        if row["reason"] is None:
            images.setdefault(_words(row), set()).add(row["item_id"])
    return [
        {**row, "reason": "duplicate", "detail": "another image has the same words"}
        if row["reason"] is None and len(images[_words(row)]) > 1
        else row
        for row in rows
    ]


def _words(row: Row) -> str:
    return " ".join(tokens(row["caption"]))


def _require_same_ids(plan: Sequence[Row], outcome: Mapping[str, str | None]) -> None:
    """Check that every caption of the plan has one outcome, and nothing else has.

    Raises:
        DataError: One is lost, or unknown.
    """
    wanted = {row["source_id"] for row in plan}
    odd = sorted(wanted ^ outcome.keys())
    if odd:
        raise DataError(
            f"{len(odd)} captions are lost or unknown, first {odd[0]!r}; remove the folder and run `slq karr` again"
        )


def _shares(rows: Sequence[Row], column: str, names: Any) -> dict[str, dict[str, float]]:
    counts = Counter(row[column] for row in rows)
    total = max(1, len(rows))
    return {
        name: {"count": counts[name], "share": round(counts[name] / total, 6)} for name in names
    }


def _judges_agreement(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """How far judges agree on all that was put to them, and how many each accepts."""
    asked = [row for row in rows if row["votes"]]
    votes = np.full((len(asked), len(names)), MISSING, dtype=np.int64)
    for place, row in enumerate(asked):
        for vote in row["votes"]:
            if vote["accept"] is not None:
                votes[place, names.index(vote["judge"])] = vote["accept"]
    given = (votes != MISSING).sum(axis=0)
    accepts = {
        name: float((votes[:, n] == 1).sum() / given[n]) if given[n] else None
        for n, name in enumerate(names)
    }
    return {**agreement(votes), "accept_share": accepts}


def _notes(recipe: Recipe) -> dict[str, str]:
    """What was not checked, by stage."""
    section = recipe.karr
    notes = {}
    if section.identify.by == "off":
        notes["identify"] = "switched off: no caption was compared with its image's neighbours"
    if not section.judges:
        notes["judge"] = "no judges"
    if not section.review.required:
        notes["review"] = "candidates that nobody has looked at stay"
    return notes


def _markdown(funnel: Funnel, summary: Mapping[str, Any]) -> str:
    lines = ["# The benchmark's funnel", "", funnel_markdown(funnel, summary["notes"]), ""]
    lines += ["| category | rows | share | paper |", "|---|---:|---:|---:|"]
    for name, found in summary["categories"].items():
        one = CATEGORIES[name]
        lines.append(
            f"| {one.title} | {found['count']:,} | {100 * found['share']:.1f}% | {100 * one.paper_share:.1f}% |"
        )
    lines += ["", "| who | rows | percent agreement | Fleiss' kappa | Krippendorff's alpha |"]
    lines.append("|---|---:|---:|---:|---:|")
    for who, found in summary["agreement"].items():
        numbers = [
            found[name] for name in ("percent_agreement", "fleiss_kappa", "krippendorff_alpha")
        ]
        shown = ["" if value is None else f"{value:.3f}" for value in numbers]
        lines.append(f"| {found['judges']} {who} | {found['rows']:,} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
