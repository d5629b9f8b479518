"""Benchmarks as their publishers' files, a few records of each, with tiny images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(path: Path, seed: int = 0) -> None:
    """A small image of noise; others have another seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(path)


def write_json(path: Path, value: Any) -> None:
    """JSON, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place; the change returns the new content, or None for one that it has changed itself."""
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def cirr(folder: Path, num_images: int = 7) -> dict[str, Any]:
    """Two queries over seven images, of which one image set has six; a training split of two images, too."""
    names = [f"dev-{n}-0-img{n % 2}" for n in range(num_images)]
    for n, name in enumerate(names):
        picture(folder / "img_raw" / "dev" / f"{name}.png", n)
    paths = {name: f"./dev/{name}.png" for name in names}
    write_json(folder / "image_splits" / "split.rc2.val.json", paths)

    def record(number: int, reference: int, target: int) -> dict[str, Any]:
        return {
            "pairid": number,
            "reference": names[reference],
            "target_hard": names[target],
            "target_soft": {names[target]: 1.0},
            "caption": f"the same  with change {number}",
            "img_set": {"id": 1, "members": names[:6], "reference_rank": 3, "target_rank": 4},
        }

    write_json(folder / "captions" / "cap.rc2.val.json", [record(10, 0, 3), record(11, 5, 1)])
    for name in ("train-1-0-img0", "train-2-0-img1"):
        picture(folder / "img_raw" / "train" / "34" / f"{name}.png", 50)
    write_json(
        folder / "image_splits" / "split.rc2.train.json",
        {n: f"./train/34/{n}.png" for n in ("train-1-0-img0", "train-2-0-img1")},
    )
    training = {"reference": "train-1-0-img0", "target_hard": "train-2-0-img1"}
    write_json(
        folder / "captions" / "cap.rc2.train.json", [record(3, 0, 1) | training | {"caption": "x"}]
    )
    return {"format": "cirr", "expected": {"gallery": num_images, "queries": 2}}


def fashion_iq(folder: Path) -> dict[str, Any]:
    """Two categories that share an image name; three and four images, two queries and one."""
    images = {"dress": ["B1", "B2", "B3"], "shirt": ["B3", "B4", "B5", "B6"]}
    for n, name in enumerate(sorted({one for names in images.values() for one in names})):
        picture(folder / "images" / f"{name}.jpg", n)
    for category, names in images.items():
        write_json(folder / "image_splits" / f"split.{category}.val.json", names)
    captions = {
        "dress": [("B1", "B2", ["is red.", "has  sleeves"]), ("B2", "B3", ["longer", "is blue"])],
        "shirt": [("B3", "B6", ["more buttons?", "darker"])],
    }
    for category, records in captions.items():
        write_json(
            folder / "captions" / f"cap.{category}.val.json",
            [{"candidate": c, "target": t, "captions": texts} for c, t, texts in records],
        )
    expected = {"queries of dress": 2, "gallery of dress": 3}
    expected |= {"queries of shirt": 1, "gallery of shirt": 4}
    return {"format": "fashion_iq", "categories": ["dress", "shirt"], "expected": expected}


def sugar_crepe(folder: Path) -> dict[str, Any]:
    """Two categories with gaps in their numbers; images are shared."""
    for n in range(3):
        picture(folder / "val2017" / f"00000000000{n}.jpg", n)

    def triple(image: int, word: str) -> dict[str, str]:
        return {
            "filename": f"00000000000{image}.jpg",
            "caption": f"a {word} beside a cat",
            "negative_caption": f"a {word} beside a dog",
        }

    write_json(folder / "data" / "replace_obj.json", {"0": triple(0, "red"), "2": triple(1, "b")})
    write_json(folder / "data" / "swap_att.json", {"5": triple(2, "green"), "7": triple(2, "old")})
    return {
        "format": "sugar_crepe",
        "categories": ["replace_obj", "swap_att"],
        "expected": {"replace_obj": 2, "swap_att": 2},
    }


def urban1k(folder: Path) -> dict[str, Any]:
    """Three numbered images and captions."""
    for n in (1, 2, 10):
        picture(folder / "image" / f"{n}.jpg", n)
        path = folder / "caption" / f"{n}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"A long caption of street {n}.\nIt has two lines.\n")
    return {"format": "urban1k", "expected": {"gallery": 3, "queries": 3}}


def sharegpt4v(folder: Path) -> dict[str, Any]:
    """Four records, of which the first three count."""
    records = []
    for n in range(4):
        image = f"sam/images/sa_{n}.jpg"
        picture(folder / image, n)
        turns = [
            {"from": "human", "value": "What do you see?\n<image>"},
            {"from": "gpt", "value": f'A picture {n}.\nWith, "details" and [brackets].'},
        ]
        records.append({"id": f"sa_{n}", "image": image, "conversations": turns})
    write_json(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", records)
    return {"format": "sharegpt4v", "first": 3, "expected": {"gallery": 3, "queries": 3}}


def karr(folder: Path) -> dict[str, Any]:
    """Four pairs in two categories, as JSON lines."""
    rows = []
    for n in range(4):
        picture(folder / "images" / f"{n}.jpg", n)
        kind = "cultural symbolism" if n % 2 else "tool or utensil use"
        rows.append({"image": f"images/{n}.jpg", "text": f"clue {n}", "category": kind})
    (folder / "karr_bench.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return {"format": "karr", "expected": {"gallery": 4, "queries": 4, "categories": 2}}


def mmeb_eval(folder: Path) -> dict[str, Any]:
    """A set of three shared labels, and one of images in which every query has candidates of its own."""
    for n in range(5):
        picture(folder / "images" / "all" / f"{n}.jpg", n)
    labels = [
        {
            "qry_text": "<|image_1|>\nWhich class?\n",
            "qry_img_path": f"all/{n}.jpg",
            "tgt_text": [labels[n % 3], labels[(n + 1) % 3], labels[(n + 2) % 3]],
            "tgt_img_path": ["", "", ""],
        }
        for labels in (["zebra", "ant", "moth"],)
        for n in range(3)
    ]
    images = [
        {
            "qry_text": f"Find image {n}",
            "qry_img_path": "",
            "tgt_text": ["<|image_1|>"] * 3,
            "tgt_img_path": [f"all/{(n + k) % 5}.jpg" for k in (2, 1, 2)],
        }
        for n in range(2)
    ]
    for name, rows in (("VOC2007", labels), ("MSCOCO_t2i", images)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / name / "test-00000-of-00001.parquet")
    return {
        "format": "mmeb_eval",
        "subsets": ["VOC2007", "MSCOCO_t2i"],
        "expected": {"VOC2007": 3, "MSCOCO_t2i": 2},
    }


def mbeir(folder: Path) -> dict[str, Any]:
    """Two queries, one with an image, and a pool of a text, an image and both."""
    for n in range(3):
        picture(folder / "mbeir_images" / f"{n}.jpg", n)
    queries = [
        {
            "qid": "9:1", "query_txt": " a  cat ", "query_img_path": None, "query_modality": "text",
            "query_src_content": None, "pos_cand_list": ["9:1", "9:3"], "neg_cand_list": [],
        },
        {
            "qid": "9:2", "query_txt": None, "query_img_path": "mbeir_images/2.jpg",
            "query_modality": "image", "pos_cand_list": [{"did": "9:2"}], "neg_cand_list": [],
        },
    ]  # fmt: skip
    pool = [
        {"did": "9:1", "txt": None, "img_path": "mbeir_images/0.jpg", "modality": "image"},
        {"did": "9:2", "txt": "a text", "img_path": None, "modality": "text"},
        {"did": "9:3", "txt": "b", "img_path": "mbeir_images/1.jpg", "modality": "image,text"},
    ]
    for name, rows in (("queries", queries), ("pool", pool)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instructions.tsv").write_text(
        "dataset_id\tquery_modality\tcand_modality\tprompt_1\tprompt_2\n"
        "9\ttext\timage\tFind an image.\tAnother.\n"
        "9\timage\ttext\t\tSay what it is.\n"
    )
    return {
        "format": "mbeir",
        "queries": "queries.jsonl",
        "pool": "pool.jsonl",
        "expected": {"gallery": 3, "queries": 2},
    }


WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    one.__name__: one
    for one in (cirr, fashion_iq, karr, mbeir, mmeb_eval, sharegpt4v, sugar_crepe, urban1k)
}
"""By `format`; each writes its files into a folder and returns the recipe's section."""
