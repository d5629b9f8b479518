"""Full-size training on a GPU: the block-resident schedule, timed, and what it makes of five epochs of COCO.

Inputs are prepared before the clock starts. A block is one global batch of images: larger blocks mix the order of
pairs and cost the same per step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jobs.bench.flops import forward, vision
from jobs.bench.measure import peak_bytes, timed
from jobs.bench.shapes import CAPTIONS, CLOSING, NUM_LATENTS, OPENING, TEXT_TOKENS, Published, Shape
from jobs.bench.sides import pictures
from slq.backbones.base import Backbone, Prompts
from slq.errors import HardwareError
from slq.latent_queries import LatentQueries
from slq.losses import info_nce
from slq.prefix import Prefix

COCO_STEPS, COCO_BATCH = 2767, 1024  # five epochs in the paper
FLOPS_PER_S = 790e12  # of bfloat16 matrices, measured on an H200
_MOST_ROWS = 512
_EMBED_PIXELS = (448, 448)


@dataclass(frozen=True)
class Plan:
    """How the schedule is run.

    Attributes:
        batch: Pairs per step.
        chunk: Rows whose activations are held at a time (GradCache).
        rows: Rows of a frozen forward pass; 0 takes as many as fit.
        steps: Measured steps.
    """

    batch: int = COCO_BATCH
    chunk: int = 128
    rows: int = 0
    steps: int = 100


class BlockResident:
    """Steps that keep the image prefixes of a block on the device and show five captions of each.

    Args:
        backbone: The frozen model.
        prompts: Prepared images; they are passed again until a batch is full.
        plan: How.
    """

    def __init__(self, backbone: Backbone, prompts: Prompts, plan: Plan) -> None:
        self.backbone = backbone
        self.plan = plan
        self.latents = LatentQueries(
            NUM_LATENTS, backbone.hidden_size, embedding_std=backbone.embedding_std
        ).to(backbone.device)
        self._prompts = prompts
        self._optimizer = torch.optim.AdamW(self.latents.parameters(), lr=1e-4, weight_decay=0.0)
        self._generator = torch.Generator().manual_seed(2)
        self._images: list[Prefix] = []

    def encode(self) -> None:
        """Replace the block: run vision tower and image prefix over a batch of images."""
        self._images = []  # the old block goes before the new one comes
        parts = [
            part
            for _ in range(math.ceil(self.plan.batch / len(self._prompts.mask)))
            for part in self._chunks(self.backbone.prefix(self._prompts))
        ]
        self._images = _first_rows(parts, self.plan.batch)

    def step(self) -> Tensor:
        """One optimiser step on the block with new captions; its loss."""
        self._optimizer.zero_grad()
        loss = self.loss(self._images, self.texts())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.latents.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def run(self, steps: int) -> None:
        """Steps with a new block after every fifth."""
        for number in range(steps):
            if number % CAPTIONS == 0:
                self.encode()
            self.step()

    def texts(self) -> list[Prefix]:
        """Prefixes of a batch of random captions, in chunks."""
        letters = torch.tensor(self.backbone.token_ids(ascii_letters))  # no control tokens
        shape = (self.plan.batch, TEXT_TOKENS)
        ids = letters[torch.randint(len(letters), shape, generator=self._generator)]
        ids = ids.to(self.backbone.device)
        prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
        return self._chunks(self.backbone.prefix(prompts))

    def loss(self, images: Sequence[Prefix], texts: Sequence[Prefix]) -> Tensor:
        """The loss of the whole batch with one chunk's activations at a time.

        What `slq.training.RetrievalModule` computes, which a machine without pydantic cannot import.
        """
        sides = (self._vectors(images), self._vectors(texts))
        return info_nce(*sides, self.latents.temperature)

    def _vectors(self, chunks: Sequence[Prefix]) -> Tensor:
        embed: Callable[..., Tensor] = self.latents.embed
        if len(chunks) == 1:
            return embed(self.backbone, chunks[0])
        return torch.cat(
            [
                checkpoint(
                    embed, self.backbone, chunk, use_reentrant=False, preserve_rng_state=False
                )
                for chunk in chunks
            ]
        )

    def _chunks(self, prefix: Prefix) -> list[Prefix]:
        rows = torch.arange(len(prefix), device=prefix.mask.device)
        if len(prefix) <= self.plan.chunk:
            return [prefix]
        return [prefix.select(part) for part in torch.split(rows, self.plan.chunk)]


def _first_rows(parts: Sequence[Prefix], count: int) -> list[Prefix]:
    """The first `count` rows of prefixes in a row."""
    kept = []
    for part in parts:
        rows = min(count, len(part))
        if rows:
            device = part.mask.device
            kept.append(
                part if rows == len(part) else part.select(torch.arange(rows, device=device))
            )
        count -= rows
    return kept


def rows_that_fit(attempt: Callable[[int], object], most: int) -> int:
    """The largest of `most`, its half, its quarter, ... for which `attempt` does not run out of memory.

    Raises:
        HardwareError: Not even one row fits.
    """
    rows = most
    while rows:
        try:
            attempt(rows)
        except torch.OutOfMemoryError:
            rows //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            return rows
    raise HardwareError(
        "the GPU has no memory left for one image; use a GPU with more, or end what runs on it"
    )


def limit_images_per_s(model: Published) -> float:
    """Images that could be embedded in a second at `FLOPS_PER_S`, 448 x 448 px."""
    if model.limit_images_per_s is not None:
        return model.limit_images_per_s
    visual, image = _tokens(model.shape, _EMBED_PIXELS)
    sizes = model.shape.sizes
    spent = vision(model.shape.family, sizes, visual) + forward(sizes, image)
    return FLOPS_PER_S / (spent + forward(sizes, NUM_LATENTS, image))


def _tokens(shape: Shape, pixels: tuple[int, int]) -> tuple[int, int]:
    """Visual tokens of an image of (width, height) pixels, and all tokens of its prefix."""
    unit = 2 * shape.sizes.patch
    visual = (pixels[0] // unit) * (pixels[1] // unit)
    return visual, OPENING + visual + CLOSING


def prepared(backbone: Backbone, rows: int, pixels: tuple[int, int]) -> tuple[Prompts, float]:
    """Prompts of random images of (width, height) pixels, and the images per second of preparing them on one thread."""
    items = pictures(rows, pixels)
    found: list[Prompts] = []
    seconds = timed(lambda: found.append(backbone.prompts(items)), backbone.device)
    return found[0], rows / seconds


def repeated(prompts: Prompts, rows: int) -> Prompts:
    """The prompt of one image `rows` times."""
    return Prompts(
        prompts.input_ids.repeat(rows, 1),
        prompts.mask.repeat(rows, 1),
        {
            name: value.repeat(rows, *[1] * (value.ndim - 1))
            for name, value in prompts.vision.items()
        },
    )


def measure_full(model: Published, backbone: Backbone, plan: Plan) -> dict[str, Any]:
    """Embedding and training throughput of a published shape.

    Returns:
        `embed` (448 x 448 px; images/s, its limit and the share reached) and `train` (seconds of a step and of encoding
        a block, peak bytes, and GPU hours for five epochs of COCO beside the paper's).

    Raises:
        HardwareError: The plan does not fit into the memory of the GPU.
    """
    try:
        return {
            "model": model.name,
            "inputs": "prepared before the clock: decoding, resizing and tokenising are left out",
            "embed": _embed(model, backbone, plan),
            "train": _train(model, backbone, plan),
        }
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            f"{model.name}: batch {plan.batch} in chunks of {plan.chunk} does not fit into the GPU's memory; "
            f"lower --chunk or --schedule-batch ({error})"
        ) from None


def _embed(model: Published, backbone: Backbone, plan: Plan) -> dict[str, Any]:
    one, per_second = prepared(backbone, 1, _EMBED_PIXELS)

    def encode(rows: int) -> None:
        backbone.prefix(repeated(one, rows))

    rows = plan.rows or rows_that_fit(encode, _MOST_ROWS)
    prompts = repeated(one, rows)
    latents = LatentQueries(NUM_LATENTS, backbone.hidden_size).to(backbone.device)

    @torch.no_grad()
    def run() -> Tensor:
        return latents.embed(backbone, backbone.prefix(prompts))

    run()
    passes = max(1, plan.steps // 10)
    seconds = timed(lambda: [run() for _ in range(passes)], backbone.device) / passes
    limit = limit_images_per_s(model)
    return {
        "pixels": list(_EMBED_PIXELS),
        "rows": rows,
        "images_per_s": rows / seconds,
        "limit_images_per_s": limit,
        "share_of_limit": rows / seconds / limit,
        "preparation_images_per_s_one_thread": per_second,
    }


def _train(model: Published, backbone: Backbone, plan: Plan) -> dict[str, Any]:
    one, _ = prepared(backbone, 1, model.training_pixels)

    def encode(rows: int) -> None:
        BlockResident(backbone, repeated(one, rows), plan).encode()

    # tried with a whole block, as its keys and values have to fit beside a pass
    rows = min(plan.batch, plan.rows or rows_that_fit(encode, min(plan.batch, _MOST_ROWS)))
    trainer = BlockResident(backbone, repeated(one, rows), plan)
    peak = peak_bytes(lambda: trainer.run(CAPTIONS), backbone.device)  # the warm-up, too
    encoding = timed(trainer.encode, backbone.device)
    step_s = timed(lambda: trainer.run(plan.steps), backbone.device) / plan.steps
    hours = coco_hours(step_s, plan.batch)
    return {
        "pixels": list(model.training_pixels),
        "rows": rows,
        "batch": plan.batch,
        "chunk": plan.chunk,
        "steps": plan.steps,
        "step_s": step_s,
        "block_encode_s": encoding,
        "pairs_per_s": plan.batch / step_s,
        "peak_bytes": peak,
        "hours_five_coco_epochs": hours,
        "paper_h800_hours": model.paper_h800_hours,
        "paper_over_ours": model.paper_h800_hours / hours,
    }


def coco_hours(step_s: float, batch: int) -> float:
    """Hours for five epochs of COCO, from the seconds of a step of `batch` pairs."""
    return step_s / batch * COCO_STEPS * COCO_BATCH / 3600
