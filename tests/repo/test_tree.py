"""What is in the repository: known places, no path of one machine, no pickles, nothing large by accident."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP_LEVEL = {
    ".ci",
    ".gitattributes",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "SECURITY.md",
    "cluster",
    "constraints.txt",
    "docs",
    "jobs",
    "pipelines",
    "pyproject.toml",
    "slq",
    "tests",
}
# assembled, so that this file does not hold what it forbids
MACHINE_PATHS = re.compile(
    r"(?<![\w.])/(?:wor" + r"k/|ho" + r"me/\w+/|ro" + r"ot/|User" + r"s/\w+/)"
)
LARGE_BYTES = 12 * 2**20


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        try:
            found[path] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


def test_the_top_level_holds_only_known_entries() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= TOP_LEVEL


def test_no_file_names_a_place_on_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATHS.search(line)
    ]
    assert found == []


def test_nothing_is_a_pickle_and_nothing_loads_one() -> None:
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz"}
    assert [path for path in tracked() if path.suffix in suffixes] == []
    loading = re.compile(
        r"\b(?:pickle\.loads?|torch\.load|allow_pickle=True|trust_remote_code=True)\b"
    )
    code = {path: text for path, text in texts().items() if path.suffix == ".py"}
    shipped = {p: t for p, t in code.items() if p.relative_to(ROOT).parts[0] != "tests"}
    assert [path for path, text in shipped.items() if loading.search(text)] == []


def test_no_file_is_larger_than_a_small_model() -> None:
    assert [path for path in tracked() if path.stat().st_size > LARGE_BYTES] == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert [path for path in tracked() if path.name in names] == []


def test_no_credentials_are_in_the_tree() -> None:
    secret = re.compile(r"AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|hf_\w{34}|-----BEGIN [A-Z ]*PRIVATE")
    assert [path for path, text in texts().items() if secret.search(text)] == []
