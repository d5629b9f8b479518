"""SLQ training on Ray Train with DeepSpeed: frozen backbones, and one small engine for the latents."""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipelines.loading import backbone_of, untrained_latents
from pipelines.progress import progress_sink
from pipelines.recipe import Recipe, require_files
from slq.artifacts import (
    AdapterConfig,
    file_sha256,
    load_adapter_config,
    read_json,
    save_adapter,
    write_json,
)
from slq.backbones import Backbone
from slq.collectives import all_agree
from slq.errors import DataError, TrainingError
from slq.latent_queries import LatentQueries
from slq.training import (
    PairSampler,
    PrefixSource,
    RetrievalModule,
    deepspeed_config,
    finite,
    learning_rate_scale,
    rank_slice,
)

log = logging.getLogger(__name__)
_HISTORY = "history.json"


class Pairs:
    """Training pairs of a Parquet file.

    Attributes:
        image_keys: For each pair a digest of its image bytes: pairs with one key share the image.

    Raises:
        DataError: A needed column is missing, or a pair lacks its image or caption.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._table = pq.read_table(path, columns=["id", "image", "text"])
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as pairs with id, image and text: {error}"
            ) from None
        for name in ("image", "text"):
            if self._table[name].null_count:
                raise DataError(
                    f"{path}: {self._table[name].null_count} pairs have no {name}; remove them"
                )
        self.image_keys = [
            hashlib.sha256(image.as_buffer()).hexdigest() for image in self._table["image"]
        ]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, number: int) -> tuple[bytes, str]:
        """(image bytes, caption) of one pair."""
        return self._table["image"][number].as_py(), self._table["text"][number].as_py()


def settings_digest(recipe: Recipe) -> str:
    """What a training run depends on; a run resumes only its own checkpoints."""
    sections = {
        name: getattr(recipe, name).model_dump(mode="json")
        for name in ("backbone", "adapter", "train")
    }
    sections["data"] = file_sha256(recipe.data.path("train"))
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:12]


def train(recipe: Recipe) -> Path:
    """Train the latent queries of a recipe; running it again resumes or, when finished, does nothing.

    Returns:
        The adapter folder.

    Raises:
        DataError: The training file cannot be used.
        TrainingError: Workers kept failing, or the loss stayed non-finite.
    """
    require_files(recipe, "train")
    digest = settings_digest(recipe)
    done = recipe.storage.dir / "train" / "done.json"
    if (
        done.is_file()
        and read_json(done)["settings"] == digest
        and _adapter_complete(recipe.storage.adapter)
    ):
        log.info("adapter %s is up to date: nothing to do", recipe.storage.adapter)
        return recipe.storage.adapter
    # Refuse here what would otherwise fail in every worker, with a long traceback.
    PairSampler(
        Pairs(recipe.data.path("train")).image_keys, recipe.train.global_batch, recipe.train.seed
    )
    started = time.monotonic()
    with progress_sink() as sink:
        result = _fit(recipe, digest, sink)
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        _install(Path(folder), recipe)
    write_json(done, {"settings": digest, "seconds": time.monotonic() - started})
    return recipe.storage.adapter


def _fit(recipe: Recipe, digest: str, sink: Any) -> Any:
    """Run the workers to the end; Ray restarts the group after a failure and resumes from its last checkpoint."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = recipe.resources.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "sink": sink},
        scaling_config=ScalingConfig(
            num_workers=recipe.resources.train_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name=f"train-{digest}",
            storage_path=str(recipe.storage.dir.resolve() / "ray"),
            failure_config=FailureConfig(max_failures=recipe.train.max_failures),
        ),
    )
    try:
        return trainer.fit()
    except Exception as error:  # Ray wraps worker failures in several classes of its own
        raise TrainingError(f"training failed: {error}") from error


def history(recipe: Recipe) -> list[dict[str, float]]:
    """Metrics of every step of the finished run."""
    steps: list[dict[str, float]] = read_json(recipe.storage.dir / "train" / _HISTORY)
    return steps


def _adapter_complete(folder: Path) -> bool:
    return folder.is_dir() and isinstance(load_adapter_config(folder), AdapterConfig)


def _install(checkpoint: Path, recipe: Recipe) -> None:
    """Move the adapter and the history out of the last checkpoint into the run folder."""
    target = recipe.storage.adapter
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint / "adapter", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    (recipe.storage.dir / "train").mkdir(parents=True, exist_ok=True)
    write_json(recipe.storage.dir / "train" / _HISTORY, read_json(checkpoint / _HISTORY))


def train_worker(settings: dict[str, Any]) -> None:
    """One rank of the training run; Ray Train calls it in every worker process."""
    import ray.train

    recipe = Recipe.model_validate(settings["recipe"])
    config = recipe.train
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    backbone = backbone_of(recipe)
    latent_queries = untrained_latents(recipe, backbone)
    engine = make_engine(recipe, backbone, latent_queries, world)
    pairs = Pairs(recipe.data.path("train"))
    sampler = PairSampler(pairs.image_keys, config.global_batch, config.seed)
    source = PrefixSource(backbone, pairs.read, cache_bytes=config.cache_bytes)
    steps: list[dict[str, float]] = []
    first = _restore(engine, steps)
    started = time.monotonic()
    for step, batch in sampler.batches(first, config.num_steps):
        mine = rank_slice(batch, rank, world).tolist()
        for group in engine.optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_scale(step, config)
        loss = engine(source.images(mine, pairs.image_keys), source.texts(mine))
        if not all_agree(finite(loss), engine.device):
            raise TrainingError(f"the loss is not finite at step {step + 1}; lower train.lr")
        engine.backward(loss)
        engine.step()
        elapsed = time.monotonic() - started
        metrics = {
            "step": step + 1,
            "loss": loss.item(),
            "temperature": latent_queries.temperature.item(),
            "gradient_norm": float(engine.get_global_grad_norm() or 0.0),
            "cached_share": source.cache.hits / max(1, source.cache.hits + source.cache.misses),
            "pairs_per_s": (step + 1 - first) * config.global_batch / elapsed,
        }
        steps.append(metrics)
        last = step + 1 == config.num_steps
        if rank == 0 and ((step + 1) % 10 == 0 or last):
            eta = elapsed / (step + 1 - first) * (config.num_steps - step - 1)
            settings["sink"].add.remote(progress_line(metrics, config.num_steps, eta))
        if (step + 1) % config.checkpoint_every == 0 or last:
            _report(engine, backbone, latent_queries, steps, rank)
    if first >= config.num_steps:
        _report(engine, backbone, latent_queries, steps, rank)


def progress_line(metrics: dict[str, float], num_steps: int, eta_s: float) -> str:
    """What a person reads every ten steps."""
    return (
        f"train step {metrics['step']:.0f}/{num_steps}  loss {metrics['loss']:.3f}  "
        f"temperature {metrics['temperature']:.3f}  {metrics['pairs_per_s']:.0f} pairs/s  "
        f"prefixes cached {metrics['cached_share']:.0%}  ETA {eta_s:.0f} s"
    )


def make_engine(
    recipe: Recipe, backbone: Backbone, latent_queries: LatentQueries, world: int
) -> Any:
    """A DeepSpeed engine whose only parameters are the latent queries and the temperature."""
    import deepspeed

    if backbone.device.type == "cpu":
        # deepspeed 0.19 compiles a shared-memory collective on first use, for a minute, and dies without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if backbone.device.type == "cuda" else "gloo")
    module = RetrievalModule(backbone, latent_queries)
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=recipe.train.lr, weight_decay=recipe.train.weight_decay
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimiser,
        config=deepspeed_config(recipe.train, world),
        dist_init_required=False,
    )
    return engine


def _restore(engine: Any, steps: list[dict[str, float]]) -> int:
    """Load the last checkpoint into the engine and the history; gives the first step to run."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        engine.load_checkpoint(folder, tag="engine")
        steps.extend(read_json(Path(folder) / _HISTORY))
    return len(steps)


def _report(
    engine: Any,
    backbone: Backbone,
    latent_queries: LatentQueries,
    steps: list[dict[str, float]],
    rank: int,
) -> None:
    """Save every rank's part of the engine and, on rank 0, the adapter and the history; then report to Ray Train."""
    import ray.train
    from ray.train import Checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        engine.save_checkpoint(str(folder), tag="engine")
        if rank == 0:
            save_adapter(folder / "adapter", backbone, latent_queries)
            write_json(folder / _HISTORY, steps)
        ray.train.report(
            dict(steps[-1]),
            checkpoint=Checkpoint.from_directory(temporary),
            checkpoint_dir_name=f"step_{len(steps):07d}",
        )
