"""The import direction, checked by import-linter and by looking at what a fresh process loads."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_contracts_hold() -> None:
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def loaded_by(statement: str) -> set[str]:
    output = python(f"import sys\n{statement}\nprint(*sorted(sys.modules))")
    return {name.split(".")[0] for name in output.split()}


def test_importing_slq_loads_nothing_heavy() -> None:
    heavy = {
        "ray",
        "fastapi",
        "starlette",
        "uvicorn",
        "faiss",
        "transformers",
        "torch",
        "deepspeed",
    }
    assert loaded_by("import slq") & heavy == set()


def test_the_core_runs_without_ray_or_a_web_framework() -> None:
    core = "import slq, slq.training, slq.index, slq.benchmarks.scenes; slq.Encoder; slq.Reranker"
    assert loaded_by(core) & {"ray", "fastapi", "starlette", "uvicorn", "deepspeed"} == set()


def test_every_public_name_of_slq_can_be_had() -> None:
    python("import slq\nfor name in slq.__all__: getattr(slq, name)")
    with pytest.raises(AttributeError, match="no attribute 'Enkoder'"):
        _ = __import__("slq").Enkoder
