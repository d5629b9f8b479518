"""Training on Ray Train: checks before the start, the worker group, and what is installed at the end."""

import errno
import hashlib
import json
import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray

import slq.errors
from pipelines.checkpoints import (
    adapters_complete,
    checkpoint_store,
    given_back,
    install,
    require_store,
)
from pipelines.loading import require_shorter
from pipelines.negatives import require_negatives
from pipelines.pairs import Pairs
from pipelines.progress import progress_sink
from pipelines.recipe import Recipe, require_files
from pipelines.selection import ChosenPairs, hold_out, negatives_of
from pipelines.trainer import Trainer
from pipelines.training_log import HISTORY, read_history
from slq.backbones.loading import backbone_revision
from slq.errors import (
    ConfigError,
    HardwareError,
    SlqError,
    StorageError,
    TrainingError,
)
from slq.files import file_sha256, read_json, write_json
from slq.training import PairSampler

log = logging.getLogger(__name__)
_FREE = (  # what may change between two parts of one run
    "zero_stage",
    "chunk_rows",
    "frozen_rows",
    "gradient_checkpointing",
    "checkpoint_every",
    "eval_every",
    "non_finite",
    "max_skipped",
    "max_error_share",
    "cache_bytes",
    "text_cache_bytes",
    "disk_cache",
    "disk_cache_bytes",
    "vision_cache",
    "vision_cache_bytes",
    "num_threads",
    "max_failures",
)


def settings_digest(recipe: Recipe) -> str:
    """What a training run depends on; a run resumes only its own checkpoints."""
    sections = {
        name: getattr(recipe, name).model_dump(mode="json")
        for name in ("backbone", "adapter", "train")
    }
    for name in _FREE:
        del sections["train"][name]
    sections["data"] = file_sha256(recipe.data.path("train"))
    if recipe.train.negatives:
        sections["negatives"] = file_sha256(recipe.data.path("negatives"))
    sections["revision"] = backbone_revision(recipe.backbone.name, recipe.backbone.revision)
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:12]


def train(recipe: Recipe) -> Path:
    """Train what the recipe's adapter section says; running it again resumes or, when finished, does nothing.

    Returns:
        The adapter folder.

    Raises:
        ConfigError: No batch can be formed, or the recipe contradicts itself.
        DataError: The training file cannot be used.
        HardwareError: The cluster cannot hold the workers.
        StorageError: The checkpoints cannot be written.
        TrainingError: Workers kept failing, or the loss was not finite.
    """
    require_files(recipe, "train")
    if recipe.train.negatives:
        require_negatives(recipe.data.path("negatives"))
    digest = settings_digest(recipe)
    done = recipe.storage.dir / "train" / "done.json"
    if done.is_file() and read_json(done)["settings"] == digest:
        if adapters_complete(recipe):
            log.info("adapter %s is up to date: nothing to do", recipe.storage.adapter)
            return recipe.storage.adapter
        if given_back(recipe, read_json(done)["checkpoint"]):
            return recipe.storage.adapter
    # Refuse here what would otherwise fail in every worker, with a long traceback.
    require_shorter(recipe, "train.matryoshka", recipe.train.matryoshka)
    _require_workers(recipe)
    require_store(recipe)
    pairs = Pairs(recipe.data.path("train"))
    if recipe.train.zero_stage == 3 and not pairs.image_to_text:
        raise ConfigError(
            "with train.zero_stage 3 all workers must make the same passes, so every pair must be one image and one "
            "text; use stage 2"
        )
    usable, refused = pairs.check(recipe.train.max_error_share)
    for name, reason in refused.items():
        log.warning("training pair %r is left out: %s", name, reason)
    kept, held = hold_out(pairs.image_keys, usable, recipe.train.held_out, recipe.train.seed)
    PairSampler([pairs.image_keys[n] for n in kept], recipe.train.global_batch, recipe.train.seed)
    negatives_of(recipe, ChosenPairs(pairs, kept))
    started = time.monotonic()
    with progress_sink() as sink:
        try:
            result = _fit(recipe, digest, {"sink": sink, "kept": kept, "held": held})
        except (StorageError, TrainingError):  # a worker's own reason says more than Ray's
            raise_refusal(ray.get(sink.trouble.remote()))
            raise
        finally:
            raise_refusal(ray.get(sink.refusal.remote()))
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        install(Path(folder), recipe)
    entry = {"settings": digest, "seconds": time.monotonic() - started, "refused": refused}
    write_json(done, {**entry, "checkpoint": result.checkpoint.path})
    return recipe.storage.adapter


def raise_refusal(refusal: str) -> None:
    """Raise the error of ours with which a worker ended the run, if one did.

    Raises:
        SlqError: Of the class and with the message that it had in the worker.
    """
    if refusal:
        name, message = json.loads(refusal)
        kind: type[SlqError] = getattr(slq.errors, name)
        raise kind(message) from None


def _require_workers(recipe: Recipe) -> None:
    """Ray Train would wait for ever for workers that the cluster cannot hold."""
    resources, present = recipe.resources, ray.cluster_resources()
    if recipe.train.global_batch < resources.train_workers:
        raise ConfigError(
            f"train.global_batch is {recipe.train.global_batch}, less than one pair for each of "
            f"{resources.train_workers} workers; raise it or lower resources.train_workers"
        )
    if 0 < recipe.train.held_out < max(2, resources.train_workers):
        raise ConfigError(
            f"train.held_out is {recipe.train.held_out}; it needs two images at least, and one for each of "
            f"{resources.train_workers} workers"
        )
    gpus = 1.0 if recipe.backbone.device.startswith("cuda") else 0.0
    if resources.gpus_per_worker != gpus:
        raise ConfigError(
            f"backbone.device is {recipe.backbone.device}, so training needs resources.gpus_per_worker {gpus:g}, "
            f"not {resources.gpus_per_worker:g}"
        )
    for cache in ("disk_cache", "vision_cache"):
        if recipe.adapter.method != "slq" and getattr(recipe.train, cache) is not None:
            raise ConfigError(
                f"train.{cache} keeps what a frozen model computes, and adapter.method {recipe.adapter.method} "
                "changes it; remove the setting"
            )
    if recipe.train.zero_stage == 3 and recipe.train.global_batch % resources.train_workers:
        raise ConfigError(
            f"with train.zero_stage 3 all workers must make the same passes, so resources.train_workers "
            f"({resources.train_workers}) must divide train.global_batch ({recipe.train.global_batch})"
        )
    for kind, each in (("CPU", 1.0), ("GPU", resources.gpus_per_worker)):
        needed = resources.train_workers * each
        if needed > present.get(kind, 0):
            raise HardwareError(
                f"resources.train_workers is {resources.train_workers}, which needs {needed:g} {kind}s, but the "
                f"cluster has {present.get(kind, 0):g}; lower it or add nodes"
            )


def _fit(recipe: Recipe, digest: str, worker: dict[str, Any]) -> Any:
    """Run the workers to the end; Ray restarts the group after a failure and resumes from its last checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = recipe.resources.gpus_per_worker
    storage_path, filesystem = checkpoint_store(recipe)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), **worker},
        scaling_config=ScalingConfig(
            num_workers=recipe.resources.train_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name=f"train-{digest}",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(
                max_failures=recipe.train.max_failures, controller_failure_limit=3
            ),
        ),
    )
    try:
        return trainer.fit()
    except Exception as error:  # Ray wraps worker failures in several classes of its own
        full = os.strerror(errno.ENOSPC)
        if full in str(error):  # wherever it was met: Ray's controller writes there too
            raise StorageError(
                f"{storage_path} cannot be written: {full}; free space and run the same command again"
            ) from None
        raise TrainingError(f"training failed: {error}") from error


def history(recipe: Recipe) -> list[dict[str, float]]:
    """Metrics of every step of the finished run."""
    return read_history(recipe.storage.dir / "train" / HISTORY)


def train_worker(settings: dict[str, Any]) -> None:
    """One rank of the training run; Ray Train calls it in every worker process."""
    import ray.train
    from ray.train import Checkpoint

    recipe = Recipe.model_validate(settings["recipe"])
    context = ray.train.get_context()
    sink = settings["sink"]
    if ray.get(sink.refusal.remote()):
        return  # what ended the run would end it again
    if context.get_world_rank() == 0:
        ray.get(sink.fail.remote(""))  # the attempt before is over

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        ray.train.report(
            dict(metrics),
            checkpoint=None if folder is None else Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step_{int(metrics['step']):07d}",
        )

    checkpoint = ray.train.get_checkpoint()
    try:
        pairs = Pairs(recipe.data.path("train"))
        kept = ChosenPairs(pairs, settings["kept"])
        trainer = Trainer(
            recipe,
            kept,
            ChosenPairs(pairs, settings["held"]),
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            say=sink.add.remote,
            negatives=negatives_of(recipe, kept),
        )
        with nullcontext() if checkpoint is None else checkpoint.as_directory() as folder:
            trainer.run(None if folder is None else Path(folder), report)
    except SlqError as error:
        reason = json.dumps([type(error).__name__, str(error)])
        # the next attempt may find the store well again; whatever else it is would only come again
        tell = sink.fail if isinstance(error, StorageError) else sink.refuse
        ray.get(tell.remote(reason))
        raise  # so that Ray ends the other workers, which may be waiting for this one
