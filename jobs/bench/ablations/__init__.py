"""Ablations of the fine stage on scenes that differ in one thing: one row per change, beside the default and coarse.

Needs a trained adapter (`slq demo`, or `slq train` with the same recipe and --set). Finished rows and scores of pairs
stay in --out with what they depend on: the same command again goes on, and rows that only reorder score nothing anew.
"""

import argparse
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from jobs.bench.ablations.chart import write_chart
from jobs.bench.ablations.running import LEVELS, Bench
from jobs.bench.ablations.settings import Row, rows_of
from jobs.bench.ablations.subject import KINDS, hard_scenes, load_subject, require_adapter
from jobs.bench.ablations.tables import markdown, summary
from jobs.bench.measure import hardware
from pipelines.loading import backbone_of
from pipelines.progress import show
from pipelines.recipe import Recipe, load_recipe
from slq.errors import ConfigError
from slq.files import write_json

_RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"
_BASE = ("coarse", "default")  # rows that all others are read beside
_EXAMPLE = "Example: slq bench ablations --only framing mcq 'static-*' --out runs/ablations"


def run(arguments: list[str]) -> dict[str, Any]:
    """Measure and return what `slq bench ablations` prints; writes ablations.json, .md and .png.

    Args:
        arguments: Of the command line, after the benchmark's name.

    Raises:
        ArtifactError: There is no trained adapter.
        ConfigError: A row is unknown, or the recipe has no scenes of ours.
    """
    options = _options(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    rows = _rows(recipe)
    chosen = _chosen(rows, options.only)
    if options.dry_run:
        return _plan(recipe, [row for row in rows if row.name in chosen], options.scenes)
    require_adapter(recipe)
    subject = load_subject(recipe, options.scenes)
    bench = Bench(subject, options.out, batch_size=recipe.rerank.batch_size)
    bench.measure([row for row in rows if row.name in chosen])
    results = [found for row in rows if (found := bench.finished(row)) is not None]
    kept = bench.levels(
        recipe.rerank.question, recipe.rerank.depth, options.repeats, fresh=LEVELS in chosen
    )
    found = {
        "bench": "ablations",
        "hardware": hardware(torch.device(recipe.backbone.device)),
        "recipe": options.recipe.name,
        "fingerprint": subject.identity["fingerprint"],
        "num_items": len(subject.items),
        "num_queries": {kind: len(subject.queries) // len(KINDS) for kind in KINDS},
        "num_hard_pairs": len(subject.pairs),
        **summary(results, recipe.rerank.question),
        **({} if kept is None else {"kept": kept}),
    }
    write_json(options.out / "ablations.json", found)
    (options.out / "ablations.md").write_text(markdown(found))
    write_chart(found["rows"], options.out / "ablations.png")
    show(f"tables: {options.out / 'ablations.md'}")
    return found


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="slq bench ablations", description=__doc__, epilog=_EXAMPLE
    )
    parser.add_argument("--recipe", type=Path, default=_RECIPE, help="default: demo.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", metavar="KEY=VALUE", help="as of other commands"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ROW",
        help="names, groups or patterns of rows (--dry-run tells them), or `kept`; default: all",
    )
    parser.add_argument("--scenes", type=int, help="hard scenes, an even number; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of what is kept of images")
    parser.add_argument("--dry-run", action="store_true", help="tell rows and pairs, and stop")
    return parser.parse_args(arguments)


def _rows(recipe: Recipe) -> tuple[Row, ...]:
    layers: Any = backbone_of(recipe, weights=False).decoder.layers
    return rows_of(recipe.rerank.question, recipe.rerank.depth, len(layers))


def _chosen(rows: tuple[Row, ...], only: list[str] | None) -> set[str]:
    """Names of what is to be measured; coarse and default always are.

    Raises:
        ConfigError: Something matches no row.
    """
    names = [row.name for row in rows] + [LEVELS]
    groups = {row.name: row.group for row in rows}
    chosen = set(_BASE)
    for wanted in only or ["*"]:
        found = {name for name in names if fnmatch(name, wanted) or groups.get(name) == wanted}
        if not found:
            raise ConfigError(f"--only {wanted} matches no row; there are {', '.join(names)}")
        chosen |= found
    return chosen


def _plan(recipe: Recipe, rows: list[Row], most: int | None) -> dict[str, Any]:
    """Rows with the pairs that each ranks, and those that no row above has scored, at most."""
    num_scenes = len(hard_scenes(recipe, most))
    num_queries, within = len(KINDS) * num_scenes, 2 * num_scenes
    deepest: dict[Any, int] = {}
    told = []
    for row in rows:
        pairs = num_queries * row.depth
        new = pairs
        if row.scoring is not None and not row.side_by_side:
            before = deepest.get(row.scoring)
            new = num_queries * max(0, row.depth - (before or 0)) + (
                within if before is None else 0
            )
            deepest[row.scoring] = max(row.depth, before or 0)
        told.append(
            {"row": row.name, "group": row.group, "says": row.says, "pairs": pairs, "new": new}
        )
    return {
        "bench": "ablations",
        "num_queries": num_queries,
        "rows": told,
        "new_pairs_at_most": sum(int(str(one["new"])) for one in told),
    }
