"""The data set's card: what is in it, and how other tools read it."""

from typing import Any

CARD = "README.md"


def card(manifest: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        manifest: Of the data set, with its counts.
    """
    lengths = manifest["dimension"]
    columns = [
        f"| `embedding` | float16, {lengths} values, unit norm; the inner product is the cosine |"
    ]
    if "int8" in manifest["outputs"]:
        columns.append(
            f"| `embedding_int8` | {lengths} codes; value = code * `scale` of `calibration.json` |"
        )
    if "binary" in manifest["outputs"]:
        columns.append(
            f"| `embedding_bits` | {-(-lengths // 8)} bytes, first value in the highest bit; 1 above `thresholds` of "
            "`calibration.json` |"
        )
    columns += [
        f"| `embedding_{name}` | float16, {lengths} values, of the adapter with fingerprint `{fingerprint}` |"
        for name, fingerprint in manifest.get("adapters", {}).items()
    ]
    table = "\n".join(columns)
    return f"""---
task_categories: [feature-extraction]
configs: [{{config_name: default, data_files: shards/*.parquet}}]
---
# Embeddings of {manifest["corpus"]}

{manifest["num_rows"]:,} rows in {manifest["num_shards"]:,} shards, {manifest["num_quarantined"]:,} more items set aside
in `errors/` with their reasons. Fingerprint of the adapter: `{manifest["fingerprint"]}`.

| column | what |
| --- | --- |
| `id` | the corpus' own |
{table}
| `modality` | `image`, `text` or `image+text` |
| `uri`, `text`, `width`, `height` | of the item; the image's size in pixels |
| `content_hash` | sha256 of the encoded image, a zero byte, and the text |
| `shard_id`, `row_in_shard` | where the item stands; gaps are quarantined rows |

The user's own columns follow. `commits/` names the shards and their sha256; `canary.parquet` holds a few items with
their vectors, to check an encoder against this data set; `slq verify` checks everything.

```python
import duckdb
duckdb.sql("SELECT id, embedding FROM 'shards/*.parquet' ORDER BY shard_id, row_in_shard")
import polars
polars.read_parquet("shards/*.parquet")
import datasets
datasets.load_dataset("parquet", data_files="shards/*.parquet")
```
"""
