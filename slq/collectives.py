"""The one place that talks to `torch.distributed`: gathers that keep the gradient, and agreement between ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All rows of all ranks; the gradient that any rank's loss sends to our rows comes back to us."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        counts = [
            torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world_size())
        ]
        dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
        sizes = [int(count) for count in counts]
        padded = local.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.start = sum(sizes[: rank()])  # type: ignore[attr-defined]
        ctx.length = len(local)  # type: ignore[attr-defined]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        # A copy: autograd may hand this very tensor to another function too.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.length]  # type: ignore[attr-defined]


def gather_rows(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order, differentiable; ranks may hold different numbers of rows.

    Every rank then computes the same global loss. Averaging parameter gradients over ranks, as data-parallel
    engines do, gives exactly the one-process gradient: the backward pass sums `world_size` equal losses.

    Args:
        local: (local_batch, ...) rows of this rank.

    Returns:
        (global_batch, ...); `local` itself in a single process.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return gathered


def all_agree(condition: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `condition` holds on every rank, so that all of them take the same branch.

    Args:
        condition: This rank's view.
        device: Where the process group's backend wants its tensors.
    """
    if world_size() == 1:
        return condition
    flag = torch.tensor([int(condition)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def union(mine: set[int]) -> set[int]:
    """The numbers that any rank holds; every rank must call it.

    Args:
        mine: This rank's.
    """
    if world_size() == 1:
        return set(mine)
    parts: list[set[int]] = [set()] * world_size()
    dist.all_gather_object(parts, mine)
    return set().union(*parts)
