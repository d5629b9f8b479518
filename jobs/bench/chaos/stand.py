"""The test stand: a corpus, an adapter and a recipe, and one run without any fault to compare with."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.bench.chaos.invariants import BrokenInvariantError, Snapshot, records, require_sound
from jobs.bench.chaos.runs import Run
from pipelines.embed import REPORT
from pipelines.loading import backbone_of, untrained_latents
from pipelines.progress import show
from pipelines.recipe import load_recipe
from slq.arrow import ITEMS
from slq.artifacts import save_adapter
from slq.benchmarks.scenes import ScenesConfig, training_pairs

SHARD_ROWS = 25
PIECE_ROWS = 10
LIMIT_S = 600.0
_DAMAGED_EVERY = 50
_EMBED = (sys.executable, "-m", "jobs.cli", "embed")


@dataclass(frozen=True, slots=True)
class Stand:
    """What the scenarios share.

    Attributes:
        work: The folder of everything.
        recipe: The recipe file.
        ids: Of the corpus.
        seconds: That the clean run took.
        first_commit_s: When its first shard was committed.
    """

    work: Path
    recipe: Path
    ids: list[str]
    seconds: float = 0.0
    first_commit_s: float = 0.0

    @property
    def clean(self) -> Path:
        """The data set of the run without any fault."""
        return self.work / "clean"

    @property
    def num_shards(self) -> int:
        """Of the data set."""
        return -(-len(self.ids) // SHARD_ROWS)

    def start(
        self,
        folder: Path,
        *,
        command: Sequence[str] = _EMBED,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Start the one command that makes a data set, or goes on with it.

        Args:
            folder: The data set.
            command: Another one than `slq embed`, of the same arguments.
            environment: Added to this process' own.
        """
        place = ["--set", f"storage.embedding_dir={folder}"]
        log = self.work / f"{folder.name}.{len(list(self.work.glob('*.log')))}.log"
        # what killed processes leave in temporary folders, Ray's session among it, goes with the rest
        scratch = {"TMPDIR": str(self.work / "tmp")}
        everything = {**scratch, **(environment or {})}
        return Run([*command, str(self.recipe), *place], log, everything)

    def missing(self, done: frozenset[int]) -> tuple[int, int]:
        """Rows, and among them those that can be embedded, of the shards that are not done."""
        left = [one for _, one in records(self.clean) if one["shard_id"] not in done]
        good = sum(one["rows"] for one in left)
        return good + sum(one["quarantined"] for one in left), good

    def finish(self, folder: Path) -> dict[str, Any]:
        """Run the same command once more and check all that must hold.

        Returns:
            Shards that were committed before, rows that were embedded, and the seconds of the run.

        Raises:
            BrokenInvariantError: Something does not hold.
        """
        before = Snapshot.of(folder)
        (folder / REPORT).unlink(missing_ok=True)  # of a run that came further
        with self.start(folder) as run:
            run.require_success(run.wait(LIMIT_S))
            seconds = run.seconds
            run.require_gone()
        return {
            "shards_before": len(before.shards),
            "embedded": self.require_finished(folder, before),
            "seconds": round(seconds, 1),
        }

    def require_finished(self, folder: Path, before: Snapshot) -> int:
        """Check a data set after the run that finished it.

        Args:
            folder: The data set.
            before: What was committed when that run began.

        Returns:
            Rows that it embedded.

        Raises:
            BrokenInvariantError: It touched committed files, embedded other rows than the missing ones, or the data
                set is not sound.
        """
        touched = before.touched(folder)
        if touched:
            raise BrokenInvariantError(f"{folder}: {touched} were committed, and were touched")
        missing = self.missing(before.shards)
        report = folder / REPORT
        found = json.loads(report.read_text()) if report.exists() else {"rows": 0, "items": 0}
        if (found["rows"], found["items"]) != missing:
            raise BrokenInvariantError(
                f"{folder}: {missing[0]} rows were missing, {missing[1]} of them good, but the run read "
                f"{found['rows']} and embedded {found['items']}"
            )
        require_sound(folder, self.clean, self.ids)
        return missing[1]


def new_stand(work: Path, num_rows: int, seed: int) -> Stand:
    """Write corpus, adapter and recipe, and make the clean data set."""
    (work / "tmp").mkdir()
    rows = corpus_rows(num_rows, seed)
    table = pa.Table.from_pylist(rows, schema=ITEMS)
    pq.write_table(table, work / "corpus.parquet", row_group_size=2 * SHARD_ROWS)
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(_recipe(work)))
    recipe = load_recipe(path)
    backbone = backbone_of(recipe)
    recipe.storage.dir.mkdir()
    save_adapter(recipe.storage.adapter, backbone, untrained_latents(recipe, backbone))
    return _with_clean_run(Stand(work, path, [row["id"] for row in rows]))


def corpus_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Pictures, captions and both by turns; a few pictures are damaged, so that there is a quarantine."""
    rows = []
    for number, pair in enumerate(training_pairs(ScenesConfig(train=count, seed=seed))):
        kind = number % 3
        image = b"damaged" if number % _DAMAGED_EVERY == 0 else pair["image"]
        rows.append(
            {
                "id": f"{number:06d}",
                "image": image if kind != 1 else None,
                "text": pair["text"] if kind != 0 else None,
            }
        )
    return rows


def _recipe(work: Path) -> dict[str, Any]:
    return {
        "backbone": {"name": "tiny"},
        "adapter": {"num_latents": 4},
        "data": {"dir": str(work), "corpus": "corpus.parquet"},
        "embed": {"shard_rows": SHARD_ROWS, "piece_rows": PIECE_ROWS, "batch_size": 8},
        "resources": {"embed_workers": 1},
        "storage": {"dir": str(work / "run")},
    }


def _with_clean_run(stand: Stand) -> Stand:
    with stand.start(stand.clean) as run:
        run.wait_for(lambda: any(records(stand.clean)), LIMIT_S)
        first_commit_s = run.seconds
        run.require_success(run.wait(LIMIT_S))
        seconds = run.seconds
    require_sound(stand.clean, stand.clean, stand.ids)
    show(f"clean run: {seconds:.0f} s, first commit after {first_commit_s:.0f} s")
    return Stand(stand.work, stand.recipe, stand.ids, seconds, first_commit_s)
