"""Urban1k and ShareGPT4V-1k: long captions and their images, both ways (Zhang et al., Long-CLIP, ECCV 2024).

Urban1k: the unpacked Urban1k.zip of https://huggingface.co/datasets/BeichenZhang/Urban1k, with `image/N.jpg` and
`caption/N.txt`. ShareGPT4V-1k: the first 1,000 records of `share-captioner_coco_lcs_sam_1246k_1107.json` of
https://huggingface.co/datasets/Lin-Chen/ShareGPT4V, a list of {image, conversations: [question, {value: caption}]}; as
Long-CLIP has it, which trains on the records behind them.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from slq.benchmarks.contract import BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.records import first_of_list, require_files, text_of, value_of
from slq.errors import ConfigError, DataError

URBAN = "https://huggingface.co/datasets/BeichenZhang/Urban1k"
SHARE = "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V"
_COUNTS = {"gallery": 1000, "queries": 1000}


class Urban1kConfig(BenchmarkConfig):
    """Where Urban1k is."""

    unique_names: ClassVar[bool] = False  # its files are numbered from 1

    format: Literal["urban1k"]
    """Names Urban1k."""
    images: str = "image"
    """Folder of the images, in `data.dir`."""
    captions: Path = Path("caption")
    """Folder of the captions."""

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        whole = self.expected is None
        return Facts("Urban1k", "all", URBAN, counts=_COUNTS, both_ways=True, is_published=whole)

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        found = sorted((folder / self.captions).glob("*.txt"))
        if not found:
            raise ConfigError(
                f"data.benchmark.captions: {folder / self.captions} holds no .txt files; unpack Urban1k.zip of {URBAN}"
            )
        return found

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        place = ImagePlace(folder, self.images)
        pairs: dict[str, tuple[str, str]] = {}
        for path in self.sources(folder):
            try:
                text = " ".join(path.read_text(encoding="utf-8").split())
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
            if not text:
                raise DataError(f"{path} is empty; the results would not be comparable")
            pairs[path.stem] = (text, place.uri(f"{path.stem}.jpg", str(path)))
        if "://" not in self.images:
            _require_captions(folder / self.images, pairs)
        return _one_to_one("urban1k", pairs, folder / self.captions)


def _require_captions(images: Path, pairs: dict[str, tuple[str, str]]) -> None:
    alone = sorted(path.name for path in images.glob("*.jpg") if path.stem not in pairs)
    if alone:
        raise DataError(f"{images}: {len(alone)} images have no caption, first {alone[0]}")


class ShareGpt4vConfig(BenchmarkConfig):
    """Where ShareGPT4V's captions and their images are."""

    format: Literal["sharegpt4v"]
    """Names ShareGPT4V-1k."""
    annotations: Path = Path("share-captioner_coco_lcs_sam_1246k_1107.json")
    """The captions' file."""
    images: str = "."
    """What the records' image paths (`sam/images/...`) are relative to: a folder in `data.dir`, or `s3://...`."""
    first: Annotated[int, Field(gt=0)] = 1000
    """Records from the beginning."""

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        return Facts(
            "ShareGPT4V-1k",
            "first 1,000",
            SHARE,
            counts=_COUNTS,
            both_ways=True,
            is_published=self.expected is None and self.first == _COUNTS["gallery"],
        )

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        return require_files([folder / self.annotations], SHARE)

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        (path,) = self.sources(folder)
        place = ImagePlace(folder, self.images)
        pairs: dict[str, tuple[str, str]] = {}
        for n, record in enumerate(first_of_list(path, self.first)):
            where = f"{path}: [{n}]"
            image = str(value_of(record, "image", str, where))
            if image in pairs:
                raise DataError(f"{where}: image {image!r} stands there twice; ids must be unique")
            pairs[image] = (_caption(record, where), place.uri(image, where))
        return _one_to_one("sharegpt4v", pairs, path)


def _caption(record: Any, where: str) -> str:
    turns = value_of(record, "conversations", list, where)
    if len(turns) < 2:
        raise DataError(f"{where}: 'conversations' must be a question and its answer")
    return text_of(turns[1], "value", f"{where}.conversations[1]")


def _one_to_one(name: str, pairs: dict[str, tuple[str, str]], where: Path) -> Tables:
    """Tables of captions and images that answer one another."""
    gallery = [Entry(f"{name}/{key}", uri=uri) for key, (_, uri) in pairs.items()]
    queries = [Entry(f"{name}-{key}", text, kind="caption") for key, (text, _) in pairs.items()]
    relevance = [(query.id, item.id) for query, item in zip(queries, gallery, strict=True)]
    counts = {"gallery": len(gallery), "queries": len(queries)}
    return Tables(gallery, queries, relevance, where, counts)
