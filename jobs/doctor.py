"""`slq doctor`: what this machine offers, and what would go wrong."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from rich.markup import escape
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
    faiss, problems = faiss_found(len(gpus))
    table.add_row("faiss", faiss)
    table.add_row("CPUs", str(os.cpu_count()))
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    disk = shutil.disk_usage(".").free
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    table.add_row("/dev/shm free", f"{shm / 2**30:.1f} GiB")
    table.add_row("disk free here", f"{disk / 2**30:.1f} GiB")
    table.add_row("open files", str(open_files))
    out.print(table)
    if shm < _MIN_SHM_BYTES:
        problems.append(
            "/dev/shm has less than 1 GiB: Ray's object store will spill to disk; enlarge it"
        )
    if disk < _MIN_DISK_BYTES:
        problems.append("less than 5 GiB of disk are free here")
    if open_files < _MIN_OPEN_FILES:
        problems.append(f"the limit of open files is {open_files}; Ray wants 4096: ulimit -n 4096")
    for problem in problems:
        out.print(f"[red]problem:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if not problems:
        out.print("[green]no problems found[/]")
    return problems


def faiss_found(num_gpus: int) -> tuple[str, list[str]]:
    """What the faiss is that is installed, and what is wrong with it.

    Args:
        num_gpus: That torch sees.
    """
    from slq.index.devices import faiss_build

    try:
        build = faiss_build()
    except ImportError:
        return "missing", ["faiss is missing: pip install faiss-cpu, or faiss-gpu"]
    except RuntimeError as error:  # a build for GPUs without its libraries
        return "cannot be loaded", [str(error)]
    problems = []
    if "missing" not in (_version("faiss-cpu"), _version("faiss-gpu")):
        problems.append(
            "faiss-cpu and faiss-gpu are both installed, and overwrite each other: pip uninstall both, install one"
        )
    if not build.is_for_gpus:
        return f"{build.version} for CPUs: index.device must be cpu", problems
    if build.num_gpus < num_gpus:
        problems.append(
            f"torch sees {num_gpus} GPUs and faiss {build.num_gpus}: is the driver too old for the CUDA of faiss-gpu?"
        )
    return f"{build.version} with code for GPUs, sees {build.num_gpus}", problems


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
