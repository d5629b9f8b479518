"""How every benchmark measures: alternating runs, medians, exact counters, and the hardware by name."""

import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each side, in the order A B C A B C ..., after one unmeasured round.

    Noise of a shared machine then falls on all sides alike, and a ratio of medians holds where seconds do not.

    Args:
        sides: What to run, by name.
        repeats: Measured rounds; at least five for a figure that is reported.
        device: A GPU is waited for before and after each run.
        warm_up: Whether to run the unmeasured round.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for measured in range(0 if warm_up else 1, repeats + 1):
        for name, run in sides.items():
            seconds = timed(run, device)
            if measured:
                times[name].append(seconds)
    return times


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; a GPU is waited for before and after."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each side."""
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass: each storage once, weights left out.

    Args:
        model: Its parameters are kept anyway.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._storages: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)  # a freed address could come back for another tensor
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._storages.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made inside and still alive, and their highest sum.

    Exact and the same on every run, as it follows storages and not an allocator. What a kernel uses for itself while
    it runs is not seen.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._followed: dict[int, weakref.finalize[..., Any]] = {}

    def __enter__(self) -> "LiveBytes":
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for finalizer in self._followed.values():
            finalizer.detach()
        self._followed.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and follow the storages that it made."""
        del types
        before = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if _counted(leaf)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if _counted(leaf) and _address(leaf) not in before:
                self._follow(leaf.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._followed:
            return
        self._followed[address] = weakref.finalize(storage, self._freed, address, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, address: int, size: int) -> None:
        self._followed.pop(address, None)
        self.live -= size


def _counted(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() > 0


def _address(leaf: torch.Tensor) -> int:
    return leaf.untyped_storage().data_ptr()


PEAK_COUNTERS = {
    "cuda": "most bytes that the CUDA allocator had handed out at once, above those before the run",
    "cpu": "most bytes of tensors made in the run and alive at once; scratch memory of kernels left out",
}
"""What `peak_bytes` counts, by type of device."""


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes in use at once during a run, above those in use before it; see `PEAK_COUNTERS`."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counter:
        run()
    return counter.peak


def hardware(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
