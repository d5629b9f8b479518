"""The same rows as a corpus of each format, on a disk or in a bucket."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rows = list[dict[str, Any]]
NUM_ROWS = 23


def png(shade: int) -> bytes:
    """A small picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(num_rows: int = NUM_ROWS) -> Rows:
    """Rows with image, text or both, and a column of the user's."""
    return [
        {
            "id": f"r{n:02d}",
            "image": png(n) if n % 3 else None,
            "text": f'row "{n}",\nin {n % 2 + 1} lines, für Ä' if n % 4 else None,
            "tag": n,
        }
        for n in range(num_rows)
    ]


def write_images(folder: Path) -> dict[str, bytes]:
    """Eleven pictures in two folders; gives them by name."""
    found = {}
    for n in range(11):
        name = f"{'deep/er/' if n % 2 else ''}{n:02d}.{('png', 'PNG')[n % 3 == 0]}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
        found[name] = png(n)
    return found


def write_parquet(path: Path, items: Rows, row_group_size: int = 5) -> Path:
    """Rows with their images inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [("id", pa.string()), ("image", pa.binary()), ("text", pa.string()), ("tag", pa.int64())]
    )
    pq.write_table(pa.Table.from_pylist(items, schema), path, row_group_size=row_group_size)
    return path


def linked(folder: Path, items: Rows) -> Rows:
    """The rows with their images in files of the folder, named by `uri`."""
    found = []
    for item in items:
        row = {name: value for name, value in item.items() if name != "image"} | {"uri": None}
        if item["image"] is not None:
            row["uri"] = f"pictures/{item['id']}.png"
            path = folder / row["uri"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item["image"])
        found.append(row)
    return found


def write_jsonl(path: Path, items: Rows) -> Path:
    """Rows with their images in files, and blank lines between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(linked(path.parent, items))
    ]
    path.write_text("\n \n".join(lines) + "\n\n", encoding="utf-8")
    return path


def write_csv(path: Path, items: Rows) -> Path:
    """Rows with their images in files; texts of several lines are quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "tag", "uri"])
        writer.writeheader()
        writer.writerows(linked(path.parent, items))
    return path


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def members_of(items: Rows) -> list[tuple[str, bytes]]:
    """Rows as members of a tar."""
    members = []
    for item in items:
        for end, data in {
            "png": item["image"],
            "txt": None if item["text"] is None else item["text"].encode(),
            "json": json.dumps({"tag": item["tag"]}).encode(),
        }.items():
            if data is not None:
                members.append((f"some/{item['id']}.{end}", data))
    return members


def upload(folder: Path, bucket: str, prefix: str) -> str:
    """Copy a folder into a bucket; gives its location."""
    import s3fs

    store = s3fs.S3FileSystem()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{bucket}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{bucket}/{prefix}"
