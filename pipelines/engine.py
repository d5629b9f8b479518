"""The DeepSpeed engine of training, and its state in a form that any number of workers and any ZeRO stage can load.

DeepSpeed's own checkpoints hold one pickled part per rank, which another number of workers cannot read. Ours is one
safetensors file: each trained tensor in float32 with its two moments, and the number of steps.
"""

import hashlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.recipe import VARIANTS, Recipe
from slq.artifacts import Adapter
from slq.backbones import Backbone
from slq.errors import ConfigError
from slq.latent_queries import LatentQueries
from slq.training import RetrievalModule, deepspeed_config

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"


def trains_in_bf16(recipe: Recipe) -> bool:
    """Whether the trained weights themselves are bfloat16; latent queries and LoRA are float32 always."""
    return recipe.adapter.method == "full" and recipe.backbone.dtype == "bfloat16"


def make_engine(
    recipe: Recipe,
    backbone: Backbone,
    adapter: Adapter,
    world: int,
    variants: Mapping[str, LatentQueries] | None = None,
) -> Any:
    """A DeepSpeed engine that trains the adapter's tensors, and those of its variants, and nothing else.

    Args:
        recipe: The resolved recipe.
        backbone: Sharded too under ZeRO-3, frozen as it is.
        adapter: The trained part.
        world: Workers.
        variants: Further trained parts; their gradients are left for `clip_each`.

    Raises:
        ConfigError: The ZeRO stage cannot train weights of this type.
    """
    if backbone.device.type == "cpu":
        # Else DeepSpeed takes a GPU that it sees, and the latents would not be where the prefixes are.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    config = recipe.train
    if trains_in_bf16(recipe) and config.zero_stage == 0:
        raise ConfigError(
            "full fine-tuning in bfloat16 needs float32 master weights: set train.zero_stage to 1, 2 or 3"
        )
    if backbone.device.type == "cpu":
        # deepspeed 0.19 compiles a shared-memory collective on first use, for a minute, and dies without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if backbone.device.type == "cuda" else "gloo")
    module = RetrievalModule(
        backbone,
        adapter,
        variants=variants,
        shard_backbone=config.zero_stage == 3,
        dimensions=config.matryoshka,
        distillation=config.distillation,
        teacher_temperature=config.teacher_temperature,
    )
    trained = [p for part in module.trained.values() for p in part.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimiser,
        config=deepspeed_config(
            config,
            world,
            bf16=trains_in_bf16(recipe),
            num_trained=sum(parameter.numel() for parameter in trained),
            clip=not variants,
        ),
        dist_init_required=False,
    )
    return engine


def training_state(engine: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """Trained tensors, moments and step count, whole and float32 on the CPU; every worker must call it.

    Args:
        engine: From `make_engine`.
        keep: Whether this worker wants the result; the others only take part.

    Returns:
        `value/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` for each trained tensor, and `step`, (1,) int64.
    """
    steps = [int(state["step"]) for state in engine.basic_optimizer.state.values()]
    tensors: dict[str, Tensor] = {_STEP: torch.tensor([max(steps, default=0)])}
    for name, parameter in _trained(engine):
        for kind in ("value", *_MOMENTS):
            whole = _whole(engine, parameter, kind, stepped=bool(steps))
            if keep:
                tensors[f"{kind}/{name}"] = whole.to("cpu", torch.float32, copy=True)
    return tensors


def gradient_norm(engine: Any, adapter: Adapter) -> float:
    """2-norm of the averaged gradient, before clipping; call it between the engine's backward and its step.

    NaN where DeepSpeed knows it only after the step (ZeRO 1 to 3), which is then `engine.get_global_grad_norm()`;
    without ZeRO it never does.
    """
    if engine.zero_optimization_stage() > 0:
        return float("nan")
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def clip_each(engine: Any, max_norm: float) -> dict[str, float]:
    """Clip the averaged gradients of each trained part by their own norm, as if it were trained alone.

    Call it between the engine's backward and its step, without ZeRO.

    Returns:
        2-norms before clipping, by the name of the part; the adapter's is empty.
    """
    return {
        name: float(torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm))
        for name, part in engine.module.trained.items()
    }


def load_training_state(engine: Any, tensors: dict[str, Tensor]) -> None:
    """Put a `training_state` back, of whatever number of workers and ZeRO stage; every worker must call it."""
    step = int(tensors[_STEP])
    for flat in _owned(engine):
        state = engine.basic_optimizer.state[flat]
        for moment in _MOMENTS:  # in place where they are: ZeRO-1 and 2 hold views of them
            state.setdefault(moment, torch.zeros_like(flat))
        state["step"] = torch.tensor(float(step))
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # as its own step does
    for name, parameter in _trained(engine):
        _set_whole(engine, parameter, None, tensors[f"value/{name}"])
        for moment in _MOMENTS:
            _set_whole(engine, parameter, moment, tensors[f"{moment}/{name}"])
    persistent = getattr(engine.optimizer, "persistent_parameters", None)
    if persistent:  # writing them let them go; ZeRO-3's own step gathers them again the same way
        persistent[0].all_gather(persistent)


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Trained tensors are whole inside, also under ZeRO-3; every worker must enter."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter for _, parameter in _trained(engine)]):
        yield


def frozen_digest(engine: Any, backbone: Backbone) -> str:
    """sha256 of the frozen weights, to show that training left them as they are; under ZeRO-3 of this worker's part."""
    if engine.zero_optimization_stage() < 3:
        return backbone.weights_sha256()
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.model.named_parameters()):
        part: Any = parameter
        digest.update(name.encode())
        digest.update(part.ds_tensor.detach().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{VARIANTS}/{part}/{name}" if part else name, parameter)
        for part, module in engine.module.trained.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def _owned(engine: Any) -> list[Tensor]:
    """The tensors that this worker's optimiser steps: parameters, or flat parts of them."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for _, parameter in _trained(engine)]
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _whole(engine: Any, parameter: nn.Parameter, kind: str, *, stepped: bool) -> Tensor:
    """A trained tensor (`value`) or one of its moments, gathered."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind != "value" and not stepped:
        return torch.zeros(_shape(parameter))
    if engine.zero_optimization_stage() == 0:
        state = engine.basic_optimizer.state
        found = parameter if kind == "value" else state[parameter][kind]
    elif kind == "value":
        found = safe_get_full_fp32_param(parameter)
    else:
        found = safe_get_full_optimizer_state(parameter, kind)
    return found.detach().reshape(_shape(parameter))


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _set_whole(engine: Any, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 3:
        _set_part(engine, parameter, moment, value)
        return
    value = value.to(parameter.device)
    if moment is None:
        parameter.data.copy_(value)
        if stage > 0:
            safe_set_full_fp32_param(parameter, value)
    elif stage == 0:
        engine.basic_optimizer.state[parameter][moment].copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _set_part(engine: Any, parameter: Any, moment: str | None, value: Tensor) -> None:
    """Under ZeRO-3: this worker's part. DeepSpeed's own function fails where parts are padded (0.19)."""
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    padded = nn.functional.pad(value.flatten(), (0, size * engine.world_size - value.numel()))
    part = padded[size * engine.global_rank : size * (engine.global_rank + 1)].to(
        parameter.ds_tensor.device
    )
    if moment is None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, moment)


def peak_memory_bytes(device: torch.device) -> float:
    """The most memory that this process has held so far: torch's on a GPU, else all that was resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
