"""What training left of the model's own abilities: benchmarks of question answering, captions and match prompts.

Each is asked with the backbone as it is and with an adapter loaded. What was asked with the same model, files and
settings is not asked again, so a run that was cut short goes on with the next set.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe
from pipelines.retaining.asking import answers_to, identity_of, scene_skills
from pipelines.retaining.kept import digest_of, finished, kept, revision_of, writing
from pipelines.retaining.outcome import (
    ADAPTED,
    PLAIN,
    compared,
    page,
    summary,
    write_answers,
)
from pipelines.tasks import collect, collect_windowed, require_gpus
from slq.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter_config
from slq.benchmarks.answering import Answer
from slq.benchmarks.questions import Question, QuestionSet, require_count
from slq.errors import ArtifactError, ConfigError
from slq.files import write_json

FOLDER = "retention"


def measure_retention(recipe: Recipe, adapter: Path | None = None) -> dict[str, Any]:
    """Measure what the recipe's `retention` section names, and write `retention.json` and `retention.md`.

    Args:
        recipe: The resolved recipe.
        adapter: Loaded for the second half; by default that of the run folder, if there is one.

    Returns:
        What `retention.json` holds: `plain` and `adapted` with their `sets` and `scenes`, `compared`, `identity`.

    Raises:
        ConfigError: Nothing is named, or files or a backbone that can be asked are missing.
        DataError: Questions are missing or malformed.
        ArtifactError: The adapter is missing or damaged.
        ArtifactMismatchError: It belongs to another backbone.
        HardwareError: The cluster has fewer GPUs than a task asks for.
        StorageError: The folder cannot be written.
    """
    require_something(recipe)
    adapter = chosen_adapter(recipe, adapter)
    counts = _checked_sets(recipe)
    folder = recipe.storage.dir / FOLDER
    sides: dict[str, Path | None] = {PLAIN: None, **({ADAPTED: adapter} if adapter else {})}
    identity = _identity(recipe, adapter, folder) if adapter else None
    found = {side: _side(recipe, one, folder / side, counts) for side, one in sides.items()}
    result: dict[str, Any] = {
        "backbone": {"model": recipe.backbone.name, "revision": revision_of(recipe)},
        "adapter": None if adapter is None else str(adapter),
        "scenes": recipe.retention.scenes,
        "identity": identity,
        "compared": _compared(folder, counts) if adapter else {},
        **found,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "retention.json", result)
        (folder / "retention.md").write_text(page(result))
    return result


def retention(recipe: Recipe, adapter: Path | None, *, num_scenes: int) -> dict[str, Any]:
    """Measure one side: the recipe's sets, and scenes on the CPU in float32.

    Each task is a process of its own that ends with it, so nothing of one adapter is left behind for the next.

    Args:
        recipe: Names the sets, and the backbone, which must be one of scenes, as `slq pretrain` makes them, if any
            are asked.
        adapter: Loaded into the backbone first, which LoRA and full fine-tuning change; None leaves it as it is.
        num_scenes: Held-out scenes to ask about; 0 asks nothing of them.

    Returns:
        `match_accuracy` and `caption_accuracy` in 0..1 where scenes were asked, `weights_sha256` of the model as it was
        asked, `weights_identical`: whether it has bit for bit the weights that it had before the adapter was loaded,
        and `sets` as `pipelines.retaining.outcome.summary` where the recipe names some.

    Raises:
        ArtifactError: The adapter is missing or damaged.
        ArtifactMismatchError: It belongs to another backbone.
        ConfigError: The backbone is of an architecture that cannot be asked.
        DataError: Questions are missing or malformed.
    """
    found = _scenes(recipe, adapter, num_scenes)
    if recipe.retention.sets:
        folder = recipe.storage.dir / FOLDER / (PLAIN if adapter is None else ADAPTED)
        counts = _checked_sets(recipe)
        found["sets"] = {name: _set(recipe, adapter, folder, name, counts[name]) for name in counts}
    return found


def plan(recipe: Recipe, adapter: Path | None = None) -> dict[str, Any]:
    """What `measure_retention` would ask, for a dry run; errors as it."""
    require_something(recipe)
    adapter = chosen_adapter(recipe, adapter)
    counts = _checked_sets(recipe)
    folder = recipe.storage.dir / FOLDER
    sides = {PLAIN: None, **({ADAPTED: adapter} if adapter else {})}
    shown: dict[str, Any] = {"adapter": None if adapter is None else str(adapter)}
    for name, count in counts.items():
        done = [
            side
            for side, one in sides.items()
            if finished(folder / side / f"{name}.json", digest_of(recipe, one, name)) is not None
        ]
        shown[name] = {"questions": count, "asked before": done}
    return {**shown, "scenes": recipe.retention.scenes}


def require_something(recipe: Recipe) -> None:
    """Refuse a recipe that names nothing.

    Raises:
        ConfigError: It does.
    """
    if not recipe.retention.sets and not recipe.retention.scenes:
        raise ConfigError(
            "retention names nothing to ask; give it a set, such as retention.mmmu.dir, or retention.scenes"
        )


def chosen_adapter(recipe: Recipe, given: Path | None) -> Path | None:
    """The adapter that is loaded: the given one, or that of the run folder if there is one.

    Raises:
        ArtifactError: There is none in the given folder, or it is incomplete.
    """
    folder = recipe.storage.adapter if given is None else given.resolve()
    if given is None and not (folder / ADAPTER_CONFIG).is_file():
        return None
    load_adapter_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ArtifactError(f"{folder} is incomplete: {ADAPTER_WEIGHTS} is missing")
    return folder


def _checked_sets(recipe: Recipe) -> dict[str, int]:
    """Questions of each set, all of which are read once before the first is asked."""
    return {
        name: _count(found, f"retention.{name}") for name, found in recipe.retention.sets.items()
    }


def _count(found: QuestionSet, key: str) -> int:
    number = sum(1 for _ in found.questions())
    place = f"{found.title} in {found.dir}"
    require_count(number, found.published, found.expected, what=place, key=key)
    return number


def _side(
    recipe: Recipe, adapter: Path | None, folder: Path, counts: Mapping[str, int]
) -> dict[str, Any]:
    """What one model can do: all sets, and scenes."""
    sets = {name: _set(recipe, adapter, folder, name, count) for name, count in counts.items()}
    number = recipe.retention.scenes
    if not number:
        return {"sets": sets}
    digest = digest_of(recipe, adapter, "scenes")
    found = kept(folder / "scenes.json", digest, lambda: _scenes(recipe, adapter, number))
    return {"sets": sets, "scenes": found}


def _set(
    recipe: Recipe, adapter: Path | None, folder: Path, name: str, count: int
) -> dict[str, Any]:
    """Scores of one set, which is asked unless it has been."""
    title = recipe.retention.sets[name].title

    def ask() -> dict[str, Any]:
        answers = _asked(recipe, adapter, name, count)
        with writing(folder):
            write_answers(folder / f"{name}.parquet", answers)
        return summary(title, answers)

    table = f"{name}.parquet"
    return kept(folder / f"{name}.json", digest_of(recipe, adapter, name), ask, table=table)


def _asked(recipe: Recipe, adapter: Path | None, name: str, count: int) -> list[Answer]:
    """Answers to all questions of a set, in order, from tasks that take a part each."""
    import ray

    found, size = recipe.retention.sets[name], recipe.retention.part_questions
    gpus = recipe.resources.gpus_per_worker
    require_gpus("resources.gpus_per_worker", gpus, "set it to 0 with backbone.device cpu")
    # max_calls: every part gets a new process, so neither memory nor a changed model is left behind
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(answers_to)
    recipe_json = recipe.model_dump_json()
    tasks = (task.remote(recipe_json, adapter, name, part) for part in _parts(found, size))
    what = f"retention {found.title}, {'backbone alone' if adapter is None else 'adapter loaded'}, part"
    parts = collect_windowed(tasks, -(-count // size), what, recipe.resources.rerank_workers)
    return [answer for part in parts for answer in part]


def _parts(found: QuestionSet, size: int) -> Iterator[list[Question]]:
    questions = iter(found.questions())
    while part := list(islice(questions, size)):
        yield part


def _scenes(recipe: Recipe, adapter: Path | None, num_scenes: int) -> dict[str, Any]:
    import ray

    task = ray.remote(num_cpus=1, max_calls=1)(scene_skills)
    asked = task.remote(recipe.model_dump_json(), adapter, num_scenes)
    found: list[dict[str, Any]] = collect([asked], "retention, scenes")
    return found[0]


def _identity(recipe: Recipe, adapter: Path, folder: Path) -> dict[str, Any]:
    import ray

    gpus = recipe.resources.gpus_per_worker
    require_gpus("resources.gpus_per_worker", gpus, "set it to 0 with backbone.device cpu")

    def compare() -> dict[str, Any]:
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(identity_of)
        found: list[dict[str, Any]] = collect(
            [task.remote(recipe.model_dump_json(), adapter)], "retention, backbone before and after"
        )
        return found[0]

    return kept(folder / "identity.json", digest_of(recipe, adapter, "identity"), compare)


def _compared(folder: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        name: compared(*(folder / side / f"{name}.parquet" for side in (PLAIN, ADAPTED)))
        for name in counts
    }
