"""The training loop of the tiny backbone: one process, resumable, reproducible from (config, step)."""

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from slq.errors import ConfigError
from slq.pretraining.config import PretrainConfig
from slq.pretraining.mixture import GRID, Mixture
from slq.pretraining.model import (
    image_processor,
    packed_hidden,
    spread_positions,
    tiny_config,
)
from slq.pretraining.packing import SKILLS, PackedBatch, Packer
from slq.pretraining.tokenizer import build_tokenizer
from slq.scenes.sampling import SceneSampler
from slq.scenes.sprites import load_sprites

Report = Callable[[dict[str, float]], None]
_HEAD_STEP = (
    256  # rows of the LM head's product, rounded up for the same reason as the packer's length
)


@dataclass(frozen=True)
class Batches:
    """Batch `step` depends only on the config and `step`, so a resumed run sees what an unbroken one would."""

    config: PretrainConfig
    mixture: Mixture
    packer: Packer

    def __call__(self, step: int) -> PackedBatch:
        """The packed batch of one optimiser step."""
        config = self.config
        images = [
            self.mixture.image_example(index)
            for index in range(step * config.image_rows, (step + 1) * config.image_rows)
        ]
        per_row = config.text_turns_per_row
        first = step * config.text_rows * per_row
        texts = [
            [self.mixture.text_turn(first + row * per_row + turn) for turn in range(per_row)]
            for row in range(config.text_rows)
        ]
        return self.packer.pack(images, texts)

    def prefetch(self, first: int, last: int) -> Iterator[tuple[int, PackedBatch]]:
        """Batches `first` to `last` - 1, each made while the one before is learned from."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            coming = pool.submit(self, first)
            for step in range(first, last):
                batch = coming.result()
                coming = pool.submit(self, step + 1)
                yield step, batch


class MuonWithAdamW:
    """Muon for the weight matrices inside layers, AdamW for embeddings, norms, biases and the patch embedding."""

    def __init__(self, model: torch.nn.Module, config: PretrainConfig) -> None:
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=config.lr_matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=config.lr_others, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._peaks = [config.lr_matrices, config.lr_others]

    def step(self, scale: float) -> None:
        """Update with learning rates `scale` times their peaks, then clear the gradients."""
        for part, peak in zip(self._parts, self._peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser state as flat tensors, so that it can be stored without pickle."""
        return {
            f"{number}.{index}.{name}": torch.as_tensor(value).contiguous()
            for number, part in enumerate(self._parts)
            for index, state in part.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for number, part in enumerate(self._parts):
            whole = part.state_dict()
            whole["state"] = {}
            for key, value in tensors.items():
                owner, index, name = key.split(".", 2)
                if int(owner) == number:
                    whole["state"].setdefault(int(index), {})[name] = value
            part.load_state_dict(whole)


# A run may be prolonged or re-weighted; anything else would change its vocabulary, shapes or examples.
_MAY_CHANGE = (
    "num_matches",
    "num_questions",
    "text_rows",
    "num_steps",
    "decay_share",
    "evaluate_every",
    "evaluate_scenes",
    "skill_weights",
)


def learning_rate_scale(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay_share` of the steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.num_steps - step) / (config.decay_share * config.num_steps)
    return min(warm, left, 1.0)


def skill_losses(
    model: Qwen3VLForConditionalGeneration, batch: PackedBatch, *, autocast: bool
) -> dict[str, Tensor]:
    """Mean next-token loss (nats) of each skill present in the batch."""
    wanted = batch.targets >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = packed_hidden(model, batch)[wanted]
        spare = -len(hidden) % _HEAD_STEP
        logits = model.lm_head(F.pad(hidden, (0, 0, 0, spare)))[: len(hidden)]
    losses = F.cross_entropy(logits.float(), batch.targets[wanted], reduction="none")
    skills = batch.skills[wanted]
    return {
        name: losses[skills == number].mean()
        for number, name in enumerate(SKILLS)
        if bool((skills == number).any())
    }


def prepare(
    config: PretrainConfig, tokenizer_dir: Path | None = None
) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerFast, Batches]:
    """The fresh model, its tokenizer and the batches of this config.

    Args:
        config: The settings.
        tokenizer_dir: Holds the run's tokenizer, or receives it: a resumed run must keep its
            vocabulary even if the mixture's words have changed since.
    """
    mixture = Mixture(
        SceneSampler("train", config.seed, load_sprites()),
        num_matches=config.num_matches,
        num_questions=config.num_questions,
    )
    if tokenizer_dir is not None and tokenizer_dir.is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    else:
        tokenizer = build_tokenizer(
            mixture, vocab_size=config.vocab_size, num_examples=config.tokenizer_examples
        )
        if tokenizer_dir is not None:
            tokenizer.save_pretrained(tokenizer_dir)
    torch.manual_seed(config.seed)
    architecture = tiny_config(
        tokenizer,
        hidden=config.hidden,
        num_layers=config.num_layers,
        vision_hidden=config.vision_hidden,
        vision_depth=config.vision_depth,
    )
    model = Qwen3VLForConditionalGeneration(architecture)
    spread_positions(model, config.position_scale, config.seed)
    return model, tokenizer, Batches(config, mixture, Packer(tokenizer, GRID))


def pretrain(config: PretrainConfig, output_dir: Path, report: Report) -> Path:
    """Train, or go on with a run in `output_dir`; returns the folder of the finished backbone.

    Args:
        config: The settings; a run that was begun with others is refused.
        output_dir: Receives `checkpoint/`, `log.jsonl` and finally `model/`.
        report: Called with the metrics of every tenth step and of every evaluation.
    """
    from slq.pretraining.evaluation import evaluate  # it imports this module's losses

    output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer, batches = prepare(config, output_dir / "tokenizer")
    optimiser = MuonWithAdamW(model, config)
    first = _restore(output_dir / "checkpoint", config, model, optimiser)
    model.train()
    started = time.monotonic()
    for step, batch in batches.prefetch(first, config.num_steps):
        losses = skill_losses(model, batch, autocast=config.autocast)
        total = sum(
            (config.skill_weights[name] * loss for name, loss in losses.items()), torch.zeros(())
        )
        total.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimiser.step(learning_rate_scale(step, config))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {step}; lower lr_matrices"
            )
        seconds = (time.monotonic() - started) / (step + 1 - first)
        metrics = {"step": float(step + 1), "seconds_per_step": seconds}
        metrics["eta_s"] = seconds * (config.num_steps - step - 1)
        metrics |= {name: loss.item() for name, loss in losses.items()}
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.num_steps:
            metrics |= evaluate(model, tokenizer, config, num_scenes=config.evaluate_scenes)
            model.train()
            _save(output_dir / "checkpoint", config, model, optimiser, step + 1)
        if (step + 1) % 10 == 0 or step + 1 == config.num_steps:
            with (output_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(metrics) + "\n")
            report(metrics)
    return export(model, tokenizer, output_dir / "model")


def export(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Path:
    """Write the backbone as an ordinary Hugging Face model folder with half-precision weights."""
    model.eval()
    half = model.to(torch.float16)
    half.config.dtype = torch.float16
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def _save(
    folder: Path,
    config: PretrainConfig,
    model: torch.nn.Module,
    optimiser: MuonWithAdamW,
    step: int,
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    weights = {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters()
    }
    save_file(weights, partial / "model.safetensors")
    save_file(optimiser.tensors(), partial / "optimiser.safetensors")
    state = {"step": step, "config": config.model_dump()}
    (partial / "state.json").write_text(json.dumps(state))
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    partial.rename(folder)


def _restore(
    folder: Path, config: PretrainConfig, model: torch.nn.Module, optimiser: MuonWithAdamW
) -> int:
    if not folder.exists():
        return 0
    state = json.loads((folder / "state.json").read_text())
    before, now = state["config"], config.model_dump()
    changed = [
        key
        for key in before | now  # a key that only one of them has differs too
        if before.get(key) != now.get(key) and key not in _MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"{folder} was begun with another {', '.join(changed)}; use the old values or another --out"
        )
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(weights, strict=False)
    optimiser.load(load_file(folder / "optimiser.safetensors"))
    return int(state["step"])
