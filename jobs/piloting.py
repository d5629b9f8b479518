"""`slq pilot` on the command line: the scores for a terminal, as Markdown and JSON, and the picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from jobs.console import AsJson, DryRun, Overrides, friendly_errors, out
from jobs.results import SYSTEM_NAMES
from slq.errors import ConfigError, StorageError
from slq.files import write_json

EXAMPLE = "Example: slq pilot jobs/recipes/demo.yaml --adapter runs/demo/adapter --seeds 16"
_RIGHT, _WRONG, _FIRST = "\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}", "\N{BULLET}"
NAMES = {
    "last_token": "last token",
    "untrained": "untrained latents",
    "slq": SYSTEM_NAMES["slq"],
}
Result = Mapping[str, Any]


def pilot(  # noqa: PLR0913 - the options of a command line
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe that names the backbone; tiny if left out")
    ] = None,
    overrides: Overrides = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="a text a line; behind tabs, if known: names of its images (with commas), a level"
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="a folder of images; goes with --texts")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="a trained adapter to compare, too")] = None,
    seeds: Annotated[
        int, typer.Option(min=2, help="draws of untrained latents: one alone is noise")
    ] = 8,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="pilot.png, .json, .md; `pilot` of the run folder if left out"),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compare last token and untrained latents on a few texts and images, as SLQ's diagnostic pilot does."""
    from pipelines.pilot import pilot as run
    from pipelines.pilot import read_case, shipped_case
    from pipelines.recipe import Recipe, load_recipe
    from slq import log

    log.configure()
    with friendly_errors():
        if (texts is None) != (images is None):
            raise ConfigError("--texts and --images go together: a text is looked for among images")
        if recipe is None and overrides:
            raise ConfigError("--set changes a recipe; name one, such as jobs/recipes/demo.yaml")
        resolved = Recipe() if recipe is None else load_recipe(recipe, overrides)
        case = shipped_case()
        if texts is not None and images is not None:
            case = read_case(texts, images)
        folder = out_dir or resolved.storage.dir / "pilot"
        if dry_run:
            shown = {
                "backbone": resolved.backbone.model_dump(mode="json"),
                "texts": [one.text for one in case.texts],
                "images": list(case.names),
                "draws": seeds,
                "out": str(folder),
            }
            print(json.dumps(shown) if as_json else yaml.safe_dump(shown, sort_keys=False), end="")
            return
        result = run(resolved, case, num_seeds=seeds, adapter=adapter)
        _write(folder, result, case)
    if as_json:
        print(json.dumps(result))
        return
    out.print(pilot_table(result))
    for line in notes(result):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print(f"[green]done[/] {folder}", soft_wrap=True)


def _write(folder: Path, result: Result, case: Any) -> None:
    from jobs.report.pilot_plot import write_pilot_plot

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "pilot.json", result)
        (folder / "pilot.md").write_text(pilot_markdown(result), encoding="utf-8")
        write_pilot_plot(result, case.images, folder / "pilot.png")
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; free space or choose another --out"
        ) from None


def mark(method: Result, text: int, image: int) -> str:
    """What stands behind a score: of a text's best image whether it is right, a dot where nobody says, else nothing."""
    if method["best"][text] != image:
        return ""
    return {True: _RIGHT, False: _WRONG, None: _FIRST}[method["is_right"][text]]


def score(method: Result, text: int, image: int) -> str:
    """A cosine with its spread over draws, if there are several."""
    value = f"{method['mean'][text][image]:.3f}"
    if method["num_draws"] > 1:
        value += f" \N{PLUS-MINUS SIGN}{method['spread'][text][image]:.3f}"
    return value.replace("-", "\N{MINUS SIGN}")


def share(method: Result, text: int) -> str:
    """In how many draws the best image is right; empty where there is one draw, or nobody says what is right."""
    value = method["share_right"][text]
    if value is None or method["num_draws"] == 1:
        return ""
    return f"{round(value * method['num_draws'])} of {method['num_draws']}"


def columns(result: Result) -> dict[str, list[str]]:
    """The table as text, column by column; a row for each text and method."""
    methods = result["methods"]
    places = [(n, name) for n in range(len(result["texts"])) for name in methods]
    found = {"text": [result["texts"][n]["text"] for n, _ in places]}
    found["level"] = [result["texts"][n]["level"] for n, _ in places]
    found["method"] = [NAMES[name] for _, name in places]
    for image, title in enumerate(result["images"]):
        cells = [
            f"{score(methods[name], n, image)} {mark(methods[name], n, image)}".strip()
            for n, name in places
        ]
        found[f"image: {title}"] = cells
    found["draws right"] = [share(methods[name], n) for n, name in places]
    return {name: cells for name, cells in found.items() if any(cells)}


def pilot_table(result: Result) -> Table:
    """The scores for a terminal."""
    table = Table(title="cosine of text and image", title_justify="left", box=None)
    found = columns(result)
    for name in found:
        side: Any = "right" if name.startswith("image: ") else "left"
        table.add_column(escape(name), justify=side, overflow="fold")
    of_text = len(result["methods"])
    for number, cells in enumerate(zip(*found.values(), strict=True)):
        is_first = number % of_text == 0
        names = {"text", "level"} if not is_first else set()  # said once for all methods
        shown = ["" if name in names else one for name, one in zip(found, cells, strict=True)]
        table.add_row(*map(escape, shown), end_section=number % of_text == of_text - 1)
    return table


def notes(result: Result) -> list[str]:
    """What the scores mean, and what they do not."""
    model = result["backbone"]["model"]
    return [
        f"Backbone {model}. {_RIGHT} best image and right, {_WRONG} best and wrong"
        f"{f', {_FIRST} best' if any(not one['answers'] for one in result['texts']) else ''}.",
        f"Untrained latents: mean \N{PLUS-MINUS SIGN} standard deviation of {len(result['seeds'])} draws of "
        f"{result['num_latents']} random vectors; a single draw is noise.",
        f"{len(result['texts'])} texts illustrate, they measure nothing: `slq eval` does.",
    ]


def pilot_markdown(result: Result) -> str:
    """The scores and their notes, to paste into a README."""
    found = columns(result)
    rules = ["---:" if name.startswith("image: ") else "---" for name in found]
    rows = [list(found), rules, *(list(cells) for cells in zip(*found.values(), strict=True))]
    lines = ["| " + " | ".join(one.replace("|", "\\|") for one in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(result)), ""])
