"""Packs the chosen Noto emoji and the clue table into `slq/scenes/sprites.parquet`.

Run once when the table changes: `python -m jobs.pack_sprites PATH_TO_UNPACKED_emoji-datasource-google`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TABLE = Path(__file__).parent / "data" / "sprites.tsv"
OUTPUT = Path(__file__).parent.parent / "slq" / "scenes" / "sprites.parquet"
LICENCE = "Apache-2.0, Google Noto Emoji, from the npm package emoji-datasource-google 16.0.0"
CATEGORY_OF_LETTER = {
    "U": "tool_use",
    "S": "spatial_context",
    "F": "functional_relation",
    "C": "cultural_symbolism",
    "E": "encyclopaedic",
    "L": "logic_mathematics",
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("name", pa.string()),
        ("plural", pa.string()),
        ("group", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("clues", pa.list_(pa.struct([("category", pa.string()), ("text", pa.string())]))),
        ("licence", pa.string()),
        ("png", pa.binary()),
    ]
)


def parse_row(line: str, package_dir: Path, emoji: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One line of the table with its picture, as a row of the Parquet file."""
    short_name, name, plural, group, *clues = line.split("\t")
    entry = emoji[short_name]
    return {
        "id": name.replace(" ", "_"),
        "name": name,
        "plural": plural,
        "group": group,
        "tags": sorted({group, entry["subcategory"], *entry["short_names"]}),
        "clues": [{"category": CATEGORY_OF_LETTER[clue[0]], "text": clue[2:]} for clue in clues],
        "licence": LICENCE,
        "png": (package_dir / "img" / "google" / "64" / entry["image"]).read_bytes(),
    }


def main(package_dir: Path) -> None:
    """Write the sprite pack and say how many sprites and clues it holds."""
    entries = json.loads((package_dir / "emoji.json").read_text())
    emoji = {entry["short_name"]: entry for entry in entries}
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    rows = [parse_row(line, package_dir, emoji) for line in lines]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), OUTPUT, compression="zstd")
    print(f"{OUTPUT.name}: {len(rows)} sprites, {sum(len(row['clues']) for row in rows)} clues")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
