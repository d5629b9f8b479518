"""What every command shares: recipe loading, dry runs, JSON output and how errors end."""

import errno
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from pipelines.recipe import DataConfig, Recipe, load_recipe
from slq import log
from slq.errors import SlqError

out = Console()
err = Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(help="YAML recipe, for example jobs/recipes/demo.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one key: --set train.num_steps=50 (repeatable)"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe and stop")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]


_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn slq's own errors, and a full or closed disk, into a red line and exit code 1; bugs keep a traceback."""
    try:
        yield
    except SlqError as error:
        err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="", highlight=False)
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        err.print("[bold red]error:[/] StorageError: ", end="", highlight=False)
        message = f"{error.filename or 'the output'} cannot be written: {error.strerror}"
        err.print(f"{message}; free space or choose another folder", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def run_stage(
    recipe_path: Path,
    overrides: list[str] | None,
    *,
    dry_run: bool,
    as_json: bool,
    stage: Callable[[Recipe], Any],
    plan: Callable[[Recipe], dict[str, Any]] | None = None,
) -> None:
    """Load a recipe and run one stage on it inside Ray.

    Args:
        recipe_path: The recipe file.
        overrides: `--set` values.
        dry_run: Print what would run, and stop.
        as_json: Print the stage's result as JSON.
        stage: The flow; its result is a path or plain data.
        plan: Extra facts for a dry run.
    """
    log.configure()
    with friendly_errors():
        recipe = load_recipe(recipe_path, overrides)
        if dry_run:
            shown = {"recipe": recipe.model_dump(mode="json"), **(plan(recipe) if plan else {})}
            # plain print: a console would wrap long paths, and then this is no YAML any more
            print(
                json.dumps(shown, indent=2)
                if as_json
                else yaml.safe_dump(shown, sort_keys=False, width=1000)
            )
            return
        result = connected(recipe, stage)
    if as_json:
        print(json.dumps(result, default=str))
    else:
        place = isinstance(result, Path | str)
        out.print(f"[green]done[/] {result}" if place else "[green]done[/]", soft_wrap=True)


def command_line() -> str:
    """The command of this process, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def print_serve_config(recipe_path: Path, overrides: list[str] | None) -> None:
    """Print the service of a recipe as a Serve config, in YAML."""
    from pipelines.serving.app import BuildArguments, serve_config

    with friendly_errors():
        recipe = load_recipe(recipe_path, overrides)
        given = BuildArguments(recipe=recipe_path.resolve(), overrides=overrides or [])
        print(yaml.safe_dump(serve_config(recipe, given), sort_keys=False, width=1000), end="")


def connected(recipe: Recipe, stage: Callable[[Recipe], Any]) -> Any:
    """Run a flow inside Ray, with missing data files generated first."""
    from pipelines.runtime import connect

    generate_files(recipe.data)
    # An error is told before Ray shuts down: a thread of Ray's that comes late may end the process without a word.
    with connect(recipe.resources), friendly_errors():
        return stage(recipe)


def generate_files(data: DataConfig) -> None:
    """Write the files that one of `data.scenes`, `karpathy`, `mmeb` and `benchmark` describes, unless they are there.

    Raises:
        ConfigError: What they are made from is missing, or files of another origin are in their place.
        DataError: What they are made from is malformed, or training data holds what is measured.
        StorageError: They cannot be written.
    """
    from slq.benchmarks.karpathy import write_karpathy
    from slq.benchmarks.mmeb import write_mmeb
    from slq.benchmarks.scenes import write_scenes
    from slq.benchmarks.writing import write_benchmark

    if data.scenes is not None:
        write_scenes(data.dir, data.scenes)
    if data.karpathy is not None:
        write_karpathy(data.dir, data.karpathy, train=data.path("train"))
    if data.mmeb is not None:
        write_mmeb(data.dir, data.mmeb)
    if data.benchmark is not None:
        write_benchmark(data.dir, data.benchmark, train=data.path("train"))
