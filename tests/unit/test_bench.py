"""Benchmarks compare equal work: same gradients, alternating runs, exact counts of saved bytes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.bench import train
from jobs.bench.measure import SavedBytes, interleaved, medians
from slq.backbones.random_weights import Draw, Sizes, random_backbone
from slq.errors import HardwareError
from tests.families import SIZES

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_sides_alternate_after_one_unmeasured_round() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]
    times = interleaved(sides, repeats=3, device=CPU)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_saved_bytes_count_each_storage_once_and_no_weights() -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    x = torch.ones(8, 4, requires_grad=True)
    with SavedBytes(model) as counter:
        y = x.exp()  # keeps its result, 8 x 4 floats
        model(y)  # keeps y again (the same storage) and the weight
    assert counter.total == 8 * 4 * 4


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_every_side_of_the_training_benchmark_has_the_same_gradient(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "GRID", 2)
    sizes: Sizes = replace(SIZES[family], side=32 if family == "internvl" else 96)
    backbone = random_backbone(family, sizes, Draw(std=0.2, dtype=torch.float64))
    step = train.Step(backbone, batch=3)
    step.latents.double()
    slow = step.gradient(step.naive)
    assert slow.abs().max() > 1e-6
    for fast in (step.latent_only, step.cached):
        torch.testing.assert_close(step.gradient(fast), slow, rtol=1e-9, atol=1e-12)
    step.latents.zero_grad()
    losses = {}
    gradients = {}
    for name in ("naive", "shared", "cached"):
        losses[name] = getattr(step, f"{name}_five_captions")()
        gradients[name] = step.latents.latents.grad
        step.latents.zero_grad()
    for name in ("shared", "cached"):
        torch.testing.assert_close(losses[name], losses["naive"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[name], gradients["naive"], rtol=1e-9, atol=1e-12)


def test_the_result_is_json_with_every_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "GRID", 2)
    monkeypatch.setitem(train._ON_CPU, "internvl", SIZES["internvl"])
    result = json.loads(
        json.dumps(train.run(["--family", "internvl", "--repeats", "1", "--batch", "2"]))
    )
    assert set(result["internvl"]["ratios"]) == {
        "step",
        "backward",
        "saved_bytes",
        "step_cached_keys_values",
        "five_captions_shared_image_prefix",
        "five_captions_cached_keys_values",
    }
    assert min(result["internvl"]["ratios"].values()) > 0
    assert result["internvl"]["gradient_difference"] < 1e-5
    assert result["hardware"]["cpus"] >= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for hardware that must be absent")
def test_an_absent_gpu_is_an_error() -> None:
    with pytest.raises(HardwareError, match="no CUDA GPU"):
        train.run(["--device", "cuda"])


def test_the_benchmarks_need_no_ray_no_faiss_and_no_typer() -> None:
    code = "import sys, jobs.bench.__main__\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded & {"ray", "faiss", "typer", "deepspeed", "fastapi"} == set()
