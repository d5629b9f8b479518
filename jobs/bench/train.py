"""What the frozen prefix saves in training: naive full passes against latent-only passes (spec: SLQ section 3).

The naive side is the published way without its waste: whole sequences with gradient, but no LM head. All sides
compute the same loss, and their gradients in the latents are compared.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.bench.flops import limits, work
from jobs.bench.measure import (
    PEAK_COUNTERS,
    SavedBytes,
    hardware,
    interleaved,
    medians,
    peak_bytes,
    timed,
)
from jobs.bench.schedule import Plan, measure_full
from jobs.bench.shapes import CAPTIONS, ON_CPU, PUBLISHED, Shape
from jobs.bench.sides import Side, Sides, backpropagate
from slq.backbones.base import Backbone
from slq.errors import ConfigError, HardwareError

_FULL_DEFAULT = ("internvl", "qwen3_vl")


def measure(backbone: Backbone, shape: Shape, *, batch: int, repeats: int) -> dict[str, Any]:
    """Every ratio of the training part for one backbone.

    Returns:
        `ratios` (naive over ours; above 1 is faster or smaller), `flop_limits` where the arithmetic gives one,
        `gradient_difference` (relative, largest over all sides), and per side of `five_captions` and `lm_step`
        the `median_s` of all its steps, `saved_bytes` of one step, `gradient_difference`, `held_bytes` (caches
        from earlier epochs) and `peak_bytes` (those included; above weights and inputs).
    """
    sides = Sides(backbone, shape, batch)
    groups = {
        name: _group(sides, group, held=sides.held_bytes[name], repeats=repeats)
        for name, group in (("five_captions", sides.five_captions), ("lm_step", sides.lm_step))
    }
    backward = medians(_backward_times(sides, repeats))
    return {
        "ratios": _ratios(groups, backward),
        "flop_limits": limits(work(shape.family, shape.sizes, shape.tokens), CAPTIONS),
        "gradient_difference": max(
            row["gradient_difference"] for rows in groups.values() for row in rows.values()
        ),
        "tokens": {
            "image_prefix": shape.tokens.image,
            "text_prefix": shape.tokens.text,
            "latents": shape.tokens.latents,
        },
        **groups,
        "lm_backward_median_s": backward,
    }


def _group(
    sides: Sides, group: dict[str, Side], *, held: dict[str, int], repeats: int
) -> dict[str, dict[str, Any]]:
    """The figures of each side of a group, which holds caches of so many bytes."""
    device = sides.backbone.device
    rows: dict[str, dict[str, Any]] = {}
    gradients: dict[str, Tensor] = {}
    for name, side in group.items():
        peak = peak_bytes(partial(_keep_gradient, gradients, name, sides, side), device)
        difference = (gradients[name] - gradients["naive"]).norm() / gradients["naive"].norm()
        rows[name] = {
            "saved_bytes": _saved(sides, side),
            "held_bytes": held.get(name, 0),
            "peak_bytes": held.get(name, 0) + peak,
            "gradient_difference": float(difference),
        }
    runs = {name: partial(backpropagate, side) for name, side in group.items()}
    times = interleaved(runs, repeats=repeats, device=device, warm_up=False)  # each has run above
    for name, seconds in medians(times).items():
        rows[name]["median_s"] = seconds
    return rows


def _keep_gradient(kept: dict[str, Tensor], name: str, sides: Sides, side: Side) -> None:
    kept[name] = sides.gradient(side)


def _saved(sides: Sides, side: Side) -> int:
    with SavedBytes(sides.backbone.model) as counter:
        next(side())
        return counter.total


def _ratios(
    groups: dict[str, dict[str, dict[str, Any]]], backward: dict[str, float]
) -> dict[str, float]:
    step, five = groups["lm_step"], groups["five_captions"]

    def ratio(rows: dict[str, dict[str, Any]], name: str, figure: str = "median_s") -> float:
        return float(rows["naive"][figure] / rows[name][figure])

    return {
        "step": ratio(step, "latent_only"),
        "backward": backward["naive"] / backward["latent_only"],
        "saved_bytes": ratio(step, "latent_only", "saved_bytes"),
        "step_cached_keys_values": ratio(step, "cached_keys_values"),
        **{f"five_captions_{name}": ratio(five, name) for name in five if name != "naive"},
    }


def _backward_times(sides: Sides, repeats: int) -> dict[str, list[float]]:
    """Seconds of the language model's backward pass alone; the forward pass runs outside the clock."""
    times: dict[str, list[float]] = {"naive": [], "latent_only": []}
    for _ in range(repeats):
        for name, seconds in times.items():
            loss = next(sides.lm_step[name]())
            seconds.append(timed(loss.backward, sides.backbone.device))
    return times


def gpu_plan(plan: Plan, *, reason: str) -> dict[str, Any]:
    """What stands under `gpu` where nothing was measured: why, what would run, and with which command."""
    return {
        "measured": False,
        "reason": reason,
        "command": "python -m jobs.bench train --full",
        "would_run": {
            family: {
                "model": PUBLISHED[family].name,
                "dtype": "bfloat16",
                "batch": plan.batch,
                "chunk": plan.chunk,
                "steps": plan.steps,
                "training_pixels": list(PUBLISHED[family].training_pixels),
                "limit_images_per_s": PUBLISHED[family].limit_images_per_s,
                "paper_h800_hours": PUBLISHED[family].paper_h800_hours,
            }
            for family in _FULL_DEFAULT
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench train", description="ratios of SLQ's frozen prefix in training"
    )
    parser.add_argument("--device", help="cpu (default) or cuda (default with --full)")
    parser.add_argument(
        "--full",
        action="store_true",
        help="published widths and depths in bfloat16, and a timed training schedule; needs a GPU",
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs per step of the ratios")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of the ratios")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of the schedule")
    parser.add_argument("--schedule-batch", type=int, default=1024, help="its pairs per step")
    parser.add_argument("--chunk", type=int, default=128, help="rows of activations held at a time")
    parser.add_argument("--rows", type=int, default=0, help="rows of a forward pass; 0: what fits")
    parser.add_argument(
        "--family",
        choices=sorted({*ON_CPU, *PUBLISHED}),
        action="append",
        help="may be given again; default: tiny, internvl and qwen3_vl",
    )
    return parser


def _device(name: str | None, *, full: bool) -> torch.device:
    if full and name == "cpu":
        raise HardwareError("--full needs a GPU, but --device is cpu; leave one of the two out")
    name = name or ("cuda" if full else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise HardwareError(f"device {name!r} was asked for, but torch sees no CUDA GPU")
    return torch.device(name)


def _families(asked: list[str] | None, *, full: bool) -> list[str]:
    families = asked or list(ON_CPU)
    unknown = [family for family in families if not full and family not in ON_CPU]
    if unknown:
        raise ConfigError(
            f"family {unknown[0]!r} is measured at full size only; add --full, or choose one of {', '.join(ON_CPU)}"
        )
    return families


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and return what `slq bench train` prints."""
    arguments = _parser().parse_args(argv)
    full = arguments.full
    device = _device(arguments.device, full=full)
    families = _families(arguments.family, full=full)
    dtype = torch.bfloat16 if full else torch.float32
    plan = Plan(arguments.schedule_batch, arguments.chunk, arguments.rows, arguments.steps)
    results: dict[str, Any] = {
        "bench": "train",
        "hardware": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "peak_bytes_counter": PEAK_COUNTERS[device.type],
        "gpu": {} if full else gpu_plan(plan, reason=_reason()),
    }
    for family in families:
        published = PUBLISHED.get(family) if full else None
        shape = published.shape if published else ON_CPU[family]
        backbone = shape.load(dtype, str(device))
        results[family] = measure(backbone, shape, batch=arguments.batch, repeats=arguments.repeats)
        if published:
            results["gpu"][family] = measure_full(published, backbone, plan)
        del backbone
    return results


def _reason() -> str:
    if torch.cuda.is_available():
        return "full-size models are measured with --full only"
    return "torch sees no CUDA GPU"
