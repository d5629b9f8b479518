"""A shard's captions from the plan to rows that are kept or rejected."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipelines.fetching import fetch_images
from pipelines.karr.judges import Candidate
from pipelines.karr.models import Models
from slq.errors import DataError
from slq.karr.categories import clue_type
from slq.karr.checks import check_words
from slq.karr.config import KarrConfig
from slq.karr.reasons import RejectedError
from slq.karr.rewriting import Source, Trace, is_named
from slq.karr.targets import Rewriting, Target
from slq.media import decode_image

ROWS = pa.schema(
    [
        ("row", pa.int64()),
        ("source_id", pa.string()),
        ("item_id", pa.string()),
        ("uri", pa.string()),
        ("original", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("target", pa.string()),
        ("phrase", pa.string()),
        ("start", pa.int32()),
        ("caption", pa.string()),
        ("clue", pa.string()),
        ("category", pa.string()),
        ("clue_type", pa.string()),
        ("rewriter", pa.string()),
        ("model", pa.string()),
        ("prompt_hash", pa.string()),
        ("seed", pa.int64()),
        ("tries", pa.int32()),
        ("checks", pa.list_(pa.string())),
        ("lead", pa.float32()),
        (
            "votes",
            pa.list_(
                pa.struct(
                    [("judge", pa.string()), ("accept", pa.bool_()), ("margin", pa.float32())]
                )
            ),
        ),
        ("made", pa.string()),
    ]
)
"""One caption of a shard with all that is known of it. `reason` is null while nothing rejects it; `lead` is null where
identification is off or there is no other image; `made` is when its words came about, ISO 8601 in UTC."""
Row = dict[str, Any]


class ShardMaker:
    """Makes the rows of shards; needs no Ray.

    Args:
        config: The recipe's section.
        models: Whom it asks.
        retry_s: How long failures of an object store are tried again.
    """

    def __init__(self, config: KarrConfig, models: Models, retry_s: float) -> None:
        self._config, self._models, self._retry_s = config, models, retry_s

    def made(self, captions: Sequence[Row]) -> list[Row]:
        """A row of `ROWS` for each caption of the plan, in order.

        Raises:
            ConfigError: An endpoint refuses its key, or WordNet is missing.
            StorageError: A store cannot be reached.
        """
        rows = [_begun(caption) for caption in captions]
        images = self._images(rows)
        open_rows = [row for row in rows if row["reason"] is None]
        candidates: dict[int, Candidate] = {}
        with ThreadPoolExecutor(self._models.threads) as pool:
            for row, found in zip(open_rows, pool.map(self._worded, open_rows), strict=True):
                if found is not None:
                    source = Source(row["row"], row["original"])
                    data = images[row["uri"]]
                    candidates[row["row"]] = Candidate(source, row["item_id"], *found, data)
        self._identify(rows, candidates)
        self._judge(rows, candidates)
        return rows

    def _images(self, rows: Sequence[Row]) -> dict[str, bytes]:
        """The images of rows, by uri; rows whose image cannot be read are rejected."""
        wanted = dict.fromkeys(row["uri"] for row in rows if row["reason"] is None)
        images, problems = {}, {}
        for uri, data in fetch_images(list(wanted), self._retry_s).items():
            try:
                if not isinstance(data, bytes):
                    raise data or DataError("there is no image in its place")
                decode_image(
                    data
                )  # whole: a header alone promises a picture that a judge could not see
                images[uri] = data
            except DataError as error:
                problems[uri] = str(error)
        for row in rows:
            if row["reason"] is None and row["uri"] in problems:
                _reject(row, "unreadable_image", problems[row["uri"]])
        return images

    def _worded(self, row: Row) -> tuple[Target, Rewriting] | None:
        """Target and new words of a caption; None where every try is rejected, the last one's reason noted."""
        for number in range(self._config.rewriter.tries):
            trace = Trace(self._config.seed + number)
            row["seed"], row["tries"] = trace.seed, number + 1
            try:
                found = self._tried(row, trace)
            except RejectedError as error:
                _reject(row, error.reason, str(error))
                if error.reason == "unanswered":
                    break  # its own retries are over
            else:
                row["reason"], row["detail"] = None, ""
                return found
            finally:
                row["prompt_hash"] = trace.prompt_hash
                row["made"] = trace.answered or datetime.now(UTC).isoformat(timespec="seconds")
        return None

    def _tried(self, row: Row, trace: Trace) -> tuple[Target, Rewriting]:
        config, models = self._config, self._models
        source = Source(row["row"], row["original"])
        row["rewriter"], row["model"] = models.rewriter.kind, models.rewriter.model
        target = models.rewriter.choose(source, trace)
        row["target"], row["phrase"] = target.name, target.phrase(source.caption)
        row["start"] = target.start
        rewriting = models.rewriter.rewrite(source, target, trace)
        row["caption"], row["clue"] = rewriting.caption, rewriting.clue
        passed = check_words(
            source.caption,
            target,
            rewriting,
            models.lexicon,
            max_chars=config.max_caption_chars,
            max_clue_words=config.max_clue_words,
            sprites=models.sprites,
        )
        row["category"], row["clue_type"] = rewriting.category, clue_type(rewriting.clue)
        row["checks"] = list(passed)
        judge = models.asked_whether_named
        if judge is not None:
            if is_named(judge, rewriting, target, trace.seed):
                raise RejectedError("names_by_model", f"{judge.name} finds {target.name!r} named")
            row["checks"].append("unnamed_by_model")
        return target, rewriting

    def _identify(self, rows: Sequence[Row], candidates: dict[int, Candidate]) -> None:
        identifier, section = self._models.identifier, self._config.identify
        if identifier is None:
            return
        by_row = {row["row"]: row for row in rows}
        for number, lead in zip(
            list(candidates), identifier.leads(list(candidates.values())), strict=True
        ):
            row = by_row[number]
            if lead is None:
                continue  # with no other image there is nothing to check
            if isinstance(lead, RejectedError):
                del candidates[number]
                _reject(row, lead.reason, str(lead))
                continue
            row["lead"] = lead
            if lead > section.min_lead:
                row["checks"].append(f"identified_{section.by}")
                continue
            del candidates[number]
            _reject(row, "not_identified", f"lead {lead:.4f}, not above {section.min_lead:g}")

    def _judge(self, rows: Sequence[Row], candidates: dict[int, Candidate]) -> None:
        if not self._models.judges:
            return
        ballots = [judge.votes(list(candidates.values())) for judge in self._models.judges]
        by_row = {row["row"]: row for row in rows}
        for place, number in enumerate(candidates):
            row = by_row[number]
            ballot = [votes[place] for votes in ballots]
            row["votes"] = [vote for vote in ballot if not isinstance(vote, RejectedError)]
            silent = [vote for vote in ballot if isinstance(vote, RejectedError)]
            given = [vote["accept"] for vote in row["votes"] if vote["accept"] is not None]
            if silent:  # those who are left must not decide alone
                _reject(row, silent[0].reason, str(silent[0]))
            elif not given:
                _reject(row, "unanswered", "no judge gave a vote")
            elif sum(given) < self._config.min_accept_share * len(given):
                _reject(row, "judges", f"{sum(given)} of {len(given)} accept")


def _begun(caption: Row) -> Row:
    """A caption of the plan as a row of which nothing else is known yet."""
    empty: Row = dict.fromkeys(ROWS.names)
    given = {
        name: caption[name] for name in ("row", "source_id", "item_id", "uri", "reason", "detail")
    }
    return {**empty, **given, "original": caption["caption"], "checks": [], "votes": []}


def _reject(row: Row, reason: str, detail: str) -> None:
    row["reason"], row["detail"] = reason, detail[:500]
