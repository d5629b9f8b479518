"""Small files of MMMU, RealWorldQA and OCRBench, in exactly the forms in which they are published."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MMMU = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("options", pa.string()),
        ("explanation", pa.string()),
        *((f"image_{number}", IMAGE) for number in range(1, 8)),
        ("img_type", pa.string()),
        ("answer", pa.string()),
        ("topic_difficulty", pa.string()),
        ("question_type", pa.string()),
        ("subfield", pa.string()),
    ]
)
REALWORLDQA = pa.schema([("image", IMAGE), ("question", pa.string()), ("answer", pa.string())])
OCRBENCH = pa.schema(
    [
        ("dataset", pa.string()),
        ("question", pa.string()),
        ("question_type", pa.string()),
        ("answer", pa.list_(pa.string())),
        ("image", IMAGE),
    ]
)
SUBJECTS = ("Accounting", "Art_Theory")


def encoded(seed: int, kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, lossless=True)
    return file.getvalue()


def cell(data: bytes | None) -> dict[str, Any]:
    """An image as `datasets` writes it, or the null of one that is not there."""
    return {"bytes": data, "path": None}


def mmmu_row(subject: str, number: int, images: int = 1, **changes: Any) -> dict[str, Any]:
    """A multiple-choice question with four options; `changes` are of columns."""
    return {
        "id": f"validation_{subject}_{number}",
        "question": f"Which sum is right? <image 1> Question {number}.",
        "options": "['$6', '$7', \"the buyer's\", 'both']",
        "explanation": "",
        **{f"image_{n}": cell(encoded(100 * number + n) if n <= images else None) for n in range(1, 8)},
        "img_type": "['Tables']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Managerial Accounting",
        **changes,
    }  # fmt: skip


def mmmu_rows() -> dict[str, list[dict[str, Any]]]:
    """Three questions of each of two subjects: several images, images in options, and open ones among them."""
    first, second = SUBJECTS
    return {
        first: [
            mmmu_row(first, 1),
            mmmu_row(first, 2, 2, question="Compare <image 1> with <image 2>. Is <image 1> larger?"),
            mmmu_row(first, 3, question_type="open", options="[]", answer="8.33", question="How much? <image 1>"),
        ],
        second: [
            mmmu_row(second, 1, 3, options="['<image 2>', '<image 3>']", answer="A"),
            mmmu_row(second, 2, question="No place for it."),
            mmmu_row(second, 3, question_type="open", options="[]", answer="['Nude', 'The Nude']"),
        ],
    }  # fmt: skip


def write_mmmu(folder: Path, rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """The folder with a folder for each subject."""
    for subject, found in (rows or mmmu_rows()).items():
        (folder / subject).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(found, schema=MMMU)
        pq.write_table(table, folder / subject / "validation-00000-of-00001.parquet")
    return folder


def write_realworldqa(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Two files in `data`, with WebP images as published."""
    found = rows or [
        {"image": cell(encoded(n, "WEBP")), "question": f"{question} Please answer directly.", "answer": answer}
        for n, (question, answer) in enumerate(
            (("Which way?\nA. Left\nB. Right\n", "A"), ("How many cars?", "3"), ("Is it wet?", "Yes"))
        )
    ]  # fmt: skip
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, rows_of_part in enumerate((found[:2], found[2:])):
        table = pa.Table.from_pylist(rows_of_part, schema=REALWORLDQA)
        pq.write_table(table, folder / "data" / f"test-{part:05d}-of-00002.parquet")
    return folder


def ocrbench_rows() -> list[dict[str, Any]]:
    """Three questions of three types."""
    names = (("IIIT5K", "Regular Text Recognition"), ("FUNSD", "Key Information Extraction"),
             ("HME100k", "Handwritten Mathematical Expression Recognition"))  # fmt: skip
    return [
        {
            "dataset": dataset,
            "question": "what is written in the image?",
            "question_type": kind,
            "answer": ["CENTRE", "CENTER"],
            "image": cell(encoded(n, "JPEG")),
        }
        for n, (dataset, kind) in enumerate(names)
    ]


def write_ocrbench(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """The Hub's form."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows or ocrbench_rows(), schema=OCRBENCH)
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    return folder


def ocrbench_records() -> list[dict[str, Any]]:
    """The authors' form of the same questions; one has its answer as a text."""
    return [
        {
            "dataset_name": row["dataset"],
            "type": row["question_type"],
            "image_path": f"{row['dataset']}/{number}.jpg",
            "question": row["question"],
            "answers": row["answer"] if number else row["answer"][0],
            "id": number,
        }
        for number, row in enumerate(ocrbench_rows())
    ]


def write_ocrbench_json(folder: Path, records: list[dict[str, Any]] | None = None) -> Path:
    """The JSON file beside its folder of images."""
    found = records if records is not None else ocrbench_records()
    for record, row in zip(found, ocrbench_rows(), strict=False):
        path = folder / "OCRBench_Images" / str(record.get("image_path", "x"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    (folder / "OCRBench.json").write_text(json.dumps(found))
    return folder
