"""M-BEIR's tasks: queries and a pool of candidates, each a text, an image or both (Wei et al., UniIR, ECCV 2024).

Reads two files of https://huggingface.co/datasets/TIGER-Lab/M-BEIR: `query/test/*.jsonl` with {qid, query_txt,
query_img_path, query_modality, pos_cand_list} and a pool of `cand_pool` with {did, txt, img_path, modality}; and on
request `instructions/query_instructions.tsv` (dataset_id, query_modality, cand_modality, then prompts), whose first
prompt for a task goes before the query's text. Image paths begin with `mbeir_images/`. The pool is read into memory,
as evaluation does: local pools fit, the union of all 5.6 million candidates does not. Its many tasks have no counts
here; give them in `expected`.
"""

import csv
from pathlib import Path
from typing import Any, ClassVar, Literal

from slq.benchmarks.contract import EVERY_KIND, BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.records import read_lines, require_files, value_of
from slq.errors import DataError

SOURCE = "https://huggingface.co/datasets/TIGER-Lab/M-BEIR"


class MbeirConfig(BenchmarkConfig):
    """Which task of M-BEIR, and where it is."""

    unique_names: ClassVar[bool] = False  # each data set's folder numbers its own files

    format: Literal["mbeir"]
    """Names a task of M-BEIR."""
    queries: Path
    """For example `query/test/mbeir_mscoco_task0_test.jsonl`."""
    pool: Path
    """For example `cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl`."""
    instructions: Path | None = None
    """`instructions/query_instructions.tsv`, to put the task's first prompt before each query."""
    images: str = "."
    """What the image paths are relative to: a folder in `data.dir`, or `s3://bucket/prefix`."""

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        return Facts(
            name=f"M-BEIR {self.queries.stem}",
            split="test",
            source=SOURCE,
            direction="query -> candidates",
            headline={EVERY_KIND: ("hit@1", "hit@5", "hit@10")},
            overall="all",
        )

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        paths = [self.queries, self.pool, *([self.instructions] if self.instructions else [])]
        return require_files([folder / path for path in paths], SOURCE)

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        place = ImagePlace(folder, self.images)
        modality: dict[str, str] = {}
        gallery: list[Entry] = []
        for where, record in read_lines(folder / self.pool):
            name = str(value_of(record, "did", str, where))
            modality[name] = str(value_of(record, "modality", str, where))
            gallery.append(_entry(name, record, ("txt", "img_path"), place, where))
        prompts = _prompts(folder / self.instructions) if self.instructions else {}
        queries: list[Entry] = []
        relevance: list[tuple[str, str]] = []
        for where, record in read_lines(folder / self.queries):
            name = str(value_of(record, "qid", str, where))
            answers = _answers(record, where)
            if answers[0] not in modality:
                raise DataError(f"{where}: candidate {answers[0]!r} is not in the pool {self.pool}")
            task = (str(value_of(record, "query_modality", str, where)), modality[answers[0]])
            entry = _entry(name, record, ("query_txt", "query_img_path"), place, where)
            text = entry.text
            if self.instructions:
                text = _prompted(text, prompts, (name.partition(":")[0], *task), where)
            queries.append(Entry(name, text, entry.uri, kind=" -> ".join(task)))
            relevance += [(name, answer) for answer in answers]
        counts = {"gallery": len(gallery), "queries": len(queries)}
        return Tables(gallery, queries, relevance, folder / self.queries, counts)


def _entry(
    name: str, record: dict[str, Any], keys: tuple[str, str], place: ImagePlace, where: str
) -> Entry:
    text, path = (record.get(key) for key in keys)
    if not all(value is None or isinstance(value, str) for value in (text, path)):
        raise DataError(f"{where}: {keys[0]!r} and {keys[1]!r} must be strings or null")
    text = " ".join((text or "").split()) or None
    if text is None and not path:
        raise DataError(f"{where} has neither {keys[0]!r} nor {keys[1]!r}")
    return Entry(name, text, place.uri(path, where) if path else None)


def _answers(record: dict[str, Any], where: str) -> list[str]:
    """Ids in `pos_cand_list`; the dataset card shows objects with `did`, the files hold plain ids."""
    found = [
        one.get("did") if isinstance(one, dict) else one
        for one in value_of(record, "pos_cand_list", list, where)
    ]
    if not found or not all(isinstance(one, str) for one in found):
        raise DataError(f"{where}: 'pos_cand_list' must name at least one candidate")
    return [str(one) for one in found]


Task = tuple[str, str, str]
"""Dataset id, modality of the query, modality of the candidate."""


def _prompts(path: Path) -> dict[Task, str]:
    """The first prompt of each task."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return {
            (row["dataset_id"], row["query_modality"], row["cand_modality"]): next(
                text for name, text in row.items() if name.startswith("prompt") and text
            )
            for row in rows
        }
    except (OSError, UnicodeDecodeError, KeyError, AttributeError, StopIteration) as error:
        raise DataError(
            f"{path} cannot be read as M-BEIR's instructions (dataset_id, query_modality, cand_modality, prompt_1): "
            f"{error!r}"
        ) from None


def _prompted(text: str | None, prompts: dict[Task, str], task: Task, where: str) -> str:
    if task not in prompts:
        raise DataError(f"{where}: the instructions have no prompt for {', '.join(task)}")
    return f"{prompts[task]} {text}" if text else prompts[task]
