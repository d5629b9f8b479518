"""`slq doctor`: what this machine offers, and what would go wrong."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from rich.table import Table

from jobs.console import out

_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "s3fs",
)
_MIN_SHM_BYTES = 2**30
_MIN_DISK_BYTES = 5 * 2**30
_MIN_OPEN_FILES = 4096


def report() -> list[str]:
    """Print the findings; gives the problems."""
    import resource

    import torch

    table = Table("what", "found", box=None)
    table.add_row("python", platform.python_version())
    for name in _PACKAGES:
        table.add_row(name, _version(name))
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none: everything runs on CPUs")
    table.add_row("CPUs", str(os.cpu_count()))
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    disk = shutil.disk_usage(".").free
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    table.add_row("/dev/shm free", f"{shm / 2**30:.1f} GiB")
    table.add_row("disk free here", f"{disk / 2**30:.1f} GiB")
    table.add_row("open files", str(open_files))
    out.print(table)
    problems = []
    if shm < _MIN_SHM_BYTES:
        problems.append(
            "/dev/shm has less than 1 GiB: Ray's object store will spill to disk; enlarge it"
        )
    if disk < _MIN_DISK_BYTES:
        problems.append("less than 5 GiB of disk are free here")
    if open_files < _MIN_OPEN_FILES:
        problems.append(f"the limit of open files is {open_files}; Ray wants 4096: ulimit -n 4096")
    if _version("faiss-cpu") == _version("faiss-gpu") == "missing":
        problems.append("faiss is missing: pip install faiss-cpu")
    for problem in problems:
        out.print(f"[red]problem:[/] {problem}")
    if not problems:
        out.print("[green]no problems found[/]")
    return problems


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
