"""Where figures come from: command, time, machine, versions, revision and digests of the data."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.recipe import Recipe
from slq.files import file_sha256

_PACKAGES = ("slq", "ray", "torch", "transformers", "numpy", "pyarrow", "faiss-cpu", "faiss-gpu")
_GIT_S = 10.0
_SETTING = {"backbone", "adapter", "eval", "rerank", "index"}


def provenance(recipe: Recipe, *, command: str = "") -> dict[str, Any]:
    """What figures of a recipe depend on and were measured with, as JSON.

    Args:
        recipe: The resolved recipe.
        command: The command line; empty where a program called us.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "git_revision": git_revision(),
        "data": {"dir": recipe.data.dir.name, **data_digests(recipe)},
        "setting": recipe.model_dump(mode="json", include=_SETTING),
    }


def hardware() -> dict[str, Any]:
    """The machine of this process, and the cluster that it works with."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }
    import ray

    if ray.is_initialized():
        resources = ray.cluster_resources()
        found["cluster"] = {
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "cpus": resources.get("CPU", 0.0),
            "gpus": resources.get("GPU", 0.0),
            "accelerators": sorted(
                name.removeprefix("accelerator_type:")
                for name in resources
                if name.startswith("accelerator_type:")
            ),
        }
    return found


def cpu_name() -> str:
    """The processor as its maker calls it, where the system says so."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Python and the installed packages that compute the figures."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(file: Path = Path(__file__)) -> str | None:
    """Commit of the checkout that holds a file, with `+changes` where tracked files differ from it.

    Args:
        file: One of ours; None is given where git does not track it, as in an installed package.
    """
    git = shutil.which("git")
    if git is None:
        return None

    def told(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                [git, "-C", str(file.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=_GIT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not told("ls-files", "--error-unmatch", file.name):
        return None
    revision = told("rev-parse", "HEAD")
    changes = told("status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if revision and changes else revision


def data_digests(recipe: Recipe) -> dict[str, str]:
    """sha256 of the files that were measured on; a corpus that is a folder or elsewhere has none."""
    found = {}
    for name in ("corpus", "queries", "relevance", "candidates"):
        if name == "corpus" and "://" in recipe.data.corpus:
            continue
        path = recipe.data.path(name)
        if path.is_file():
            found[name] = file_sha256(path)
    return found
