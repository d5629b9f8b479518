"""One worker of a training run: reads its share of each batch, steps the engine, checks, and writes checkpoints."""

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.engine import (
    clip_each,
    frozen_digest,
    gathered,
    gradient_norm,
    load_training_state,
    make_engine,
    peak_memory_bytes,
    training_state,
)
from pipelines.loading import backbone_of, untrained_adapter, untrained_latents
from pipelines.negatives import MinedNegatives
from pipelines.recipe import VARIANTS, Recipe
from pipelines.training_log import (
    HISTORY,
    TrainingLog,
    progress_line,
    read_history,
    write_history,
)
from pipelines.training_source import training_source
from slq.artifacts import load_trained, save_adapter
from slq.collectives import all_agree, gather_rows, union
from slq.diagnostics import diagnose
from slq.errors import StorageError, TrainingError, UnusablePairError
from slq.files import read_json, write_json
from slq.latent_queries import LatentQueries
from slq.training import (
    MinedRows,
    PairReader,
    PairSampler,
    PrefixSource,
    finite,
    learning_rate_scale,
    rank_slice,
    substitute,
)

log = logging.getLogger(__name__)
ADAPTER = "adapter"
_STATE = "training_state.safetensors"
_POSITION = "position.json"
_HELD_OUT_BYTES = 2**28


class Trainer:
    """One worker.

    Args:
        recipe: The resolved recipe.
        pairs: What to learn from.
        held_out: What to measure on every `train.eval_every` steps; may be empty.
        negatives: Mined wrong images of the pairs' captions; None to do without.
        rank: Of this worker.
        world: Workers.
        say: Takes a progress line; rank 0 only.

    Attributes:
        steps: Metrics of each step so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        pairs: PairReader,
        held_out: PairReader,
        *,
        rank: int,
        world: int,
        say: Callable[[str], Any],
        negatives: MinedNegatives | None = None,
    ) -> None:
        self._negatives = negatives
        self._recipe, self._config = recipe, recipe.train
        self._keys = pairs.image_keys
        self._data = _digest(pairs.image_keys)
        self._rank, self._world, self._say = rank, world, say
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        self._backbone = backbone_of(recipe)
        self._adapter = untrained_adapter(recipe, self._backbone)
        self._variants = {
            name: untrained_latents(recipe, self._backbone, name)
            for name in recipe.adapter.variants
        }
        self._sampler = PairSampler(
            self._keys,
            self._config.global_batch,
            self._config.seed,
            order=self._config.order,
            block_batches=self._config.block_batches,
        )
        self._source = training_source(recipe, self._backbone, pairs, world)
        self._held_out = training_source(
            recipe, self._backbone, held_out, world, cache_bytes=_HELD_OUT_BYTES
        )
        self._held_rows = np.arange(len(held_out.image_keys))
        self.steps: list[dict[str, float]] = []
        self._bad: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._skipped = 0
        self._engine: Any = None

    def run(self, checkpoint: Path | None, report: "Report") -> None:
        """Train from a checkpoint, or from the start, to the last step.

        Args:
            checkpoint: As `report` got it.
            report: Called by every worker at each checkpoint, with the metrics of the last step and, on rank 0, the
                checkpoint's folder; the folder is removed afterwards.

        Raises:
            TrainingError: The loss or the gradient was not finite, more often than the recipe allows.
        """
        frozen_part = self._recipe.adapter.method == "slq"
        if checkpoint is not None:
            load_trained(self._adapter, checkpoint / ADAPTER / "adapter_model.safetensors")
        self._engine = make_engine(
            self._recipe, self._backbone, self._adapter, self._world, self._variants
        )
        first = self._restore(checkpoint) if checkpoint is not None else 0
        digest = frozen_digest(self._engine, self._backbone) if frozen_part else ""
        if first and self._rank == 0:
            self._say(f"train goes on after step {first}")
        self._read_held_out()
        with self._log(first) as journal:
            self._loop(first, journal, report)
            intact = not frozen_part or frozen_digest(self._engine, self._backbone) == digest
            if not all_agree(intact, self._engine.device):
                raise TrainingError(
                    "the frozen backbone changed during training; please report this"
                )
            self._checkpoint(report)

    def _read_held_out(self) -> None:
        """Leave out held-out pairs that cannot be read, on all workers, before a measurement would meet them."""
        while len(self._held_rows):
            broken: set[int] = set()
            try:
                self._held_out.read(rank_slice(self._held_rows, self._rank, self._world).tolist())
            except UnusablePairError as error:
                broken = {error.pair}
                log.warning("held-out pair %d is left out: %s", error.pair, error)
            if all_agree(not broken, self._engine.device):
                break
            self._held_rows = np.setdiff1d(self._held_rows, list(union(broken)))
        if len(self._held_rows) < max(2, self._world):
            self._held_rows = self._held_rows[:0]  # nothing to measure, or nothing for some worker
        even = len(self._held_rows) // self._world * self._world
        self._held_rows = self._held_rows[:even]  # ZeRO-3 needs the same passes everywhere

    def _log(self, first: int) -> AbstractContextManager[TrainingLog | None]:
        if self._rank:
            return nullcontext()
        return TrainingLog(self._recipe.storage.dir / "train", resume_at=first)

    def _loop(self, first: int, journal: TrainingLog | None, report: "Report") -> None:
        """All steps; the last one's checkpoint is left to the caller."""
        started = time.monotonic()
        batches = list(self._sampler.batches(first, self._config.num_steps))
        for place, (step, batch) in enumerate(batches, start=1):
            last = place == len(batches)
            metrics = self._step(step, batch, None if last else batches[place][1])
            elapsed, done = time.monotonic() - started, place
            metrics["pairs_per_s"] = done * self._config.global_batch / elapsed
            if place == 1:
                self._warn_of_small_cache()
            if last or (step + 1) % self._config.eval_every == 0:
                metrics |= self._measure()
            self.steps.append(metrics)
            if journal is not None:
                journal.write(step + 1, {k: v for k, v in metrics.items() if k != "step"})
                if last or (step + 1) % 10 == 0:
                    eta = elapsed / done * (self._config.num_steps - step - 1)
                    self._say(progress_line(metrics, self._config.num_steps, eta))
            if not last and (step + 1) % self._config.checkpoint_every == 0:
                self._checkpoint(report)

    def _warn_of_small_cache(self) -> None:
        """Say once when a block's prefixes do not fit, for then they are computed again for each caption."""
        config = self._config
        if not isinstance(self._source, PrefixSource) or config.order != "block" or self._rank:
            return
        images = min(config.block_batches * config.global_batch, len(set(self._keys)))
        needed = images / self._world * self._source.bytes_per_query
        several = len(self._keys) > len(set(self._keys))
        if several and needed > config.cache_bytes:
            self._say(
                f"warning: a block's image prefixes need {needed / 2**30:.1f} GiB per worker, more than "
                f"train.cache_bytes ({config.cache_bytes / 2**30:.1f} GiB), so they are computed once per caption; "
                "raise it, or lower train.block_batches"
            )

    # One step ------------------------------------------------------------------------------------------------

    def _step(
        self, step: int, batch: NDArray[np.int64], following: NDArray[np.int64] | None
    ) -> dict[str, float]:
        began = time.monotonic()
        mine = self._readable(step, batch)
        decoded = time.monotonic()
        queries, positives = self._source.queries(mine), self._source.positives(mine)
        mined = self._mined(mine)
        if following is not None:  # its images decode while this step updates
            coming = rank_slice(following, self._rank, self._world).tolist()
            self._source.begin(coming, self._wrong(coming))
        prepared = time.monotonic()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self._config.lr * learning_rate_scale(step, self._config)
        loss = self._engine(queries, positives, mined)
        norms, done = self._update(step, loss)
        losses = dict(zip(norms, self._engine.module.losses.tolist(), strict=True))
        metrics: dict[str, float] = {"step": step + 1}
        for name, adapter in {"": self._adapter, **self._variants}.items():
            metrics |= {
                f"{_group(name)}loss": losses[name],
                f"{_group(name)}temperature": float(adapter.temperature.detach()),
                f"{_group(name)}gradient_norm": norms[name],
            }
        return metrics | {
            "cached_share": self._source.cached_share,
            "skipped": self._skipped,
            "unusable": len(self._bad),
            "updated": float(done),
            "peak_memory_bytes": peak_memory_bytes(self._backbone.device),
            "seconds/read": decoded - began,
            "seconds/frozen": prepared - decoded,
            "seconds/update": time.monotonic() - prepared,
        }

    def _readable(self, step: int, batch: NDArray[np.int64]) -> list[int]:
        """This worker's pairs; all workers learn of an unusable one together, and replace it alike."""
        while True:
            whole = substitute(batch, self._keys, self._bad, seed=step)
            mine: list[int] = rank_slice(whole, self._rank, self._world).tolist()
            broken: set[int] = set()
            try:
                self._source.read(mine, self._wrong(mine))
            except UnusablePairError as error:
                broken, self._reasons[error.pair] = {error.pair}, str(error)
            if all_agree(not broken, self._engine.device):
                return mine
            self._bad |= union(broken)
            self._require_few_bad()

    def _wrong(self, mine: list[int]) -> list[int]:
        """The pairs whose images are mined negatives of some pairs' captions; without them none."""
        if self._negatives is None:
            return []
        chosen: list[int] = self._negatives.of(mine, self._bad)[0].ravel().tolist()
        return chosen

    def _mined(self, mine: list[int]) -> MinedRows | None:
        """The mined negatives of this worker's pairs, ready for the step."""
        if self._negatives is None:
            return None
        chosen, present = self._negatives.of(mine, self._bad)
        margins = self._negatives.margins_of(mine)
        device = self._backbone.device
        return MinedRows(
            self._source.queries(chosen.ravel().tolist()),
            torch.from_numpy(present).to(device),
            None if margins is None else torch.from_numpy(margins).to(device),
        )

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Diagnostics on the held-out pairs, which all workers embed together."""
        if not len(self._held_rows):
            return {}
        mine = rank_slice(self._held_rows, self._rank, self._world).tolist()
        sides: tuple[Any, Any] = self._held_out.queries(mine), self._held_out.positives(mine)
        found: dict[str, float] = {}
        for name, adapter in {"": self._adapter, **self._variants}.items():
            measured = self._diagnosed(adapter, sides)
            found |= {f"{_group(name)}{metric}": value for metric, value in measured.items()}
        return found

    def _diagnosed(self, adapter: Any, sides: tuple[Any, Any]) -> dict[str, float]:
        vectors = [
            gather_rows(torch.cat([adapter.embed(self._backbone, part) for part in side]))
            for side in sides
        ]
        options: dict[str, Any] = {}
        if isinstance(adapter, LatentQueries):
            states = [
                gather_rows(torch.cat([adapter.states(self._backbone, part) for part in side]))
                for side in sides
            ]
            options["latents"] = adapter.latents.detach()  # the images' where texts have their own
            options["states"] = dict(zip(("images", "texts"), states, strict=True))
        return diagnose(*vectors, ks=(1, 5, 10), **options)

    def _require_few_bad(self) -> None:
        share = len(self._bad) / len(self._keys)
        if share > self._config.max_error_share:
            number, reason = next(iter(self._reasons.items()), (-1, "another worker knows"))
            raise TrainingError(
                f"{len(self._bad)} of {len(self._keys)} training pairs turned out to be unusable, for example "
                f"number {number}: {reason}; mend them or raise train.max_error_share"
            )

    def _update(self, step: int, loss: Tensor) -> tuple[dict[str, float], bool]:
        """Step the engine where loss and gradient are finite on all workers; gives the norms, and whether it did."""
        names = ("", *self._variants)
        if not all_agree(finite(loss), self._engine.device):
            losses = dict(zip(names, self._engine.module.losses.tolist(), strict=True))
            self._refuse(step, f"loss{_whose(losses)}")
            return dict.fromkeys(names, float("nan")), False
        skipping = self._config.non_finite == "skip"
        before = training_state(self._engine) if skipping else {}
        self._engine.backward(loss)
        if self._variants:
            norms = clip_each(self._engine, self._config.clip_norm)
        else:
            norms = {"": gradient_norm(self._engine, self._adapter)}
        self._engine.step()
        if self._config.zero_stage > 0:
            norms[""] = float(self._engine.get_global_grad_norm() or 0.0)
        if all_agree(bool(np.isfinite(list(norms.values())).all()), self._engine.device):
            return norms, True
        self._refuse(step, f"gradient{_whose(norms)}")
        load_training_state(self._engine, before)
        return norms, False

    def _refuse(self, step: int, what: str) -> None:
        self._skipped += 1
        if self._config.non_finite == "halt" or self._skipped > self._config.max_skipped:
            raise TrainingError(
                f"the {what} is not finite at step {step + 1} ({self._skipped} such steps). The last checkpoint is "
                "kept: go on from it with train.non_finite: skip, or begin anew with a lower train.lr"
            )
        log.warning("the %s is not finite at step %d: the step is left out", what, step + 1)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def _checkpoint(self, report: "Report") -> None:
        tensors = training_state(self._engine, keep=self._rank == 0)
        with tempfile.TemporaryDirectory() as temporary, gathered(self._engine):
            folder = Path(temporary)
            if self._rank == 0:
                try:
                    save_file(tensors, folder / _STATE)
                except (OSError, SafetensorError) as error:  # safetensors wraps the former
                    raise StorageError(
                        f"no checkpoint could be written to {folder}: {error}; free space there"
                    ) from None
                save_adapter(folder / ADAPTER, self._backbone, self._adapter)
                for name, variant in self._variants.items():
                    save_adapter(folder / VARIANTS / name, self._backbone, variant)
                write_history(folder / HISTORY, self.steps)
                position = {"bad": sorted(self._bad), "skipped": self._skipped, "data": self._data}
                write_json(folder / _POSITION, position)
            report(self.steps[-1], folder if self._rank == 0 else None)

    def _restore(self, checkpoint: Path) -> int:
        """Load the last checkpoint; gives the first step to run."""
        load_training_state(self._engine, load_file(checkpoint / _STATE))
        self.steps.extend(read_history(checkpoint / HISTORY))
        position = read_json(checkpoint / _POSITION)
        if position["data"] != self._data:
            raise TrainingError(
                "the usable training pairs are others than when this run began (an image was mended, or could not "
                "be read just now), so it cannot go on in the same order; run again, or use another storage.dir"
            )
        self._bad, self._skipped = set(position["bad"]), position["skipped"]
        return len(self.steps)


def _whose(values: Mapping[str, float]) -> str:
    """Of which variants a value is not finite, as far as this worker can tell."""
    names = [name for name, value in values.items() if name and not np.isfinite(value)]
    return f" of {' and '.join(names)}" if names else ""


def _group(variant: str) -> str:
    """What a variant's metrics are called by; those of the adapter itself have no group."""
    return f"{VARIANTS}/{variant}/" if variant else ""


Report = Callable[[dict[str, float], Path | None], None]


def _digest(keys: list[str]) -> str:
    """sha256 of the pairs' images in order, which is what the order of training depends on."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\x00")
    return digest.hexdigest()
