"""How every benchmark measures: alternating runs, medians, exact counters, and the hardware by name."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if measured:
                times[name].append(time.perf_counter() - started)
    return times


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
