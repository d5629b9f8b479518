"""SLQ training on Ray Train with DeepSpeed: frozen backbones, and one small engine for the latents."""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipelines.loading import backbone_of, untrained_latents
from pipelines.progress import progress_sink
from pipelines.recipe import Recipe, require_files
from slq.artifacts import (
    ADAPTER_WEIGHTS,
    file_sha256,
    load_adapter_config,
    read_json,
    save_adapter,
    write_json,
)
from slq.backbones import Backbone
from slq.backbones.loading import backbone_revision
from slq.collectives import all_agree
from slq.errors import (
    ArtifactError,
    DataError,
    HardwareError,
    MediaError,
    StorageError,
    TrainingError,
)
from slq.latent_queries import LatentQueries
from slq.media import decode_image
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

    def check(self, max_error_share: float) -> tuple[list[int], dict[str, str]]:
        """Try every image and caption once, so that a bad one is left out here instead of failing a worker later.

        Args:
            max_error_share: More unusable pairs than this share are an error.

        Returns:
            Positions of the usable pairs, and the reason of each id that is left out.

        Raises:
            DataError: Too many pairs are unusable; the first is named.
        """
        refused: dict[str, str] = {}
        usable = []
        verdicts: dict[str, str | None] = {}
        for number, (key, text) in enumerate(
            zip(self.image_keys, self._table["text"].to_pylist(), strict=True)
        ):
            if key not in verdicts:
                verdicts[key] = _refusal(self._table["image"][number].as_py())
            reason = verdicts[key] or (None if text.strip() else "the caption is empty")
            if reason is None:
                usable.append(number)
            else:
                refused[self._table["id"][number].as_py()] = reason
        if len(refused) > max_error_share * len(self):
            name, reason = next(iter(refused.items()))
            raise DataError(
                f"{len(refused)} of {len(self)} training pairs cannot be used, first {name!r}: {reason}; "
                "mend them or raise train.max_error_share"
            )
        return usable, refused

    def read(self, number: int) -> tuple[bytes, str]:
        """(image bytes, caption) of one pair."""
        return self._table["image"][number].as_py(), self._table["text"][number].as_py()


def _refusal(image: bytes) -> str | None:
    try:
        decode_image(image)
    except MediaError as error:
        return str(error)
    return None


def settings_digest(recipe: Recipe) -> str:
    """What a training run depends on; a run resumes only its own checkpoints."""
    sections = {
        name: getattr(recipe, name).model_dump(mode="json")
        for name in ("backbone", "adapter", "train")
    }
    sections["data"] = file_sha256(recipe.data.path("train"))
    sections["revision"] = backbone_revision(recipe.backbone.name, recipe.backbone.revision)
    # DeepSpeed's checkpoints hold one part per rank, so another number of workers cannot read them
    sections["workers"] = recipe.resources.train_workers
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
    _require_workers(recipe)
    pairs = Pairs(recipe.data.path("train"))
    usable, refused = pairs.check(recipe.train.max_error_share)
    for name, reason in refused.items():
        log.warning("training pair %r is left out: %s", name, reason)
    PairSampler([pairs.image_keys[n] for n in usable], recipe.train.global_batch, recipe.train.seed)
    started = time.monotonic()
    with progress_sink() as sink:
        result = _fit(recipe, digest, {"sink": sink, "usable": np.array(usable)})
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        _install(Path(folder), recipe)
    seconds = time.monotonic() - started
    write_json(done, {"settings": digest, "seconds": seconds, "refused": refused})
    return recipe.storage.adapter


def _require_workers(recipe: Recipe) -> None:
    """Ray Train would wait for ever for workers that the cluster cannot hold."""
    import ray

    resources, present = recipe.resources, ray.cluster_resources()
    for kind, each in (("CPU", 1.0), ("GPU", resources.gpus_per_worker)):
        needed = resources.train_workers * each
        if needed > present.get(kind, 0):
            raise HardwareError(
                f"resources.train_workers is {resources.train_workers}, which needs {needed:g} {kind}s, but the "
                f"cluster has {present.get(kind, 0):g}; lower it or add nodes"
            )


def _fit(recipe: Recipe, digest: str, worker: dict[str, Any]) -> Any:
    """Run the workers to the end; Ray restarts the group after a failure and resumes from its last checkpoint."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = recipe.resources.gpus_per_worker
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
            storage_path=str(recipe.storage.dir.resolve() / "ray"),
            failure_config=FailureConfig(
                max_failures=recipe.train.max_failures, controller_failure_limit=3
            ),
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
    """Whether both files are there; an adapter that lost one is given back from the last checkpoint."""
    try:
        load_adapter_config(folder)
    except ArtifactError:
        return False
    return (folder / ADAPTER_WEIGHTS).is_file()


def _install(checkpoint: Path, recipe: Recipe) -> None:
    """Move the adapter and the history out of the last checkpoint into the run folder."""
    target = recipe.storage.adapter
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint / "adapter", partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:
        raise StorageError(
            f"adapter {target} cannot be written: {error}; free space and run `slq train` again"
        ) from None
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
    usable = settings["usable"]
    keys = [pairs.image_keys[n] for n in usable]
    sampler = PairSampler(keys, config.global_batch, config.seed)
    source = PrefixSource(backbone, pairs.read, cache_bytes=config.cache_bytes)
    steps: list[dict[str, float]] = []
    first = _restore(engine, steps)
    frozen = backbone.weights_sha256() if rank == 0 else ""
    started = time.monotonic()
    for step, batch in sampler.batches(first, config.num_steps):
        mine = usable[rank_slice(batch, rank, world)].tolist()
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
            if last and rank == 0 and backbone.weights_sha256() != frozen:
                raise TrainingError(
                    "the frozen backbone changed during training; please report this"
                )
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
