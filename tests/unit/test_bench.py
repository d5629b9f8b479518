"""Benchmarks compare equal work: same gradients, alternating runs, exact counts of bytes and operations."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench import flops, schedule, train
from jobs.bench.flops import Tokens
from jobs.bench.measure import LiveBytes, SavedBytes, interleaved, medians, peak_bytes
from jobs.bench.schedule import BlockResident, Plan
from jobs.bench.shapes import NUM_LATENTS, ON_CPU, PUBLISHED, TEXT_TOKENS, Shape
from jobs.bench.sides import Sides, backpropagate, pictures
from slq.backbones.base import Backbone, Prompts
from slq.backbones.random_weights import Draw, Sizes, random_backbone
from slq.errors import ConfigError, HardwareError
from slq.prefix import Prefix
from slq.training import RetrievalModule
from tests.families import SIZES

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FAMILIES = ["internvl", "qwen3_vl"]


def _shape(family: str) -> Shape:
    sizes: Sizes = replace(SIZES[family], side=32 if family == "internvl" else 96)
    return Shape(family, sizes, grid=2)


def _backbone(family: str, dtype: torch.dtype = torch.float64) -> Backbone:
    return random_backbone(family, _shape(family).sizes, Draw(std=0.2, dtype=dtype))


def _sides(family: str) -> Sides:
    sides = Sides(_backbone(family), _shape(family), batch=3)
    sides.latents.double()
    return sides


def test_sides_alternate_after_one_unmeasured_round() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
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


def test_live_bytes_follow_what_is_made_and_freed() -> None:
    before = torch.ones(100)
    with LiveBytes() as counter:
        first = before + 1  # 400 bytes
        view = first[:10]
        first.mul_(2)  # in place: nothing new
        assert (counter.live, counter.peak) == (400, 400)
        second = torch.cat([first, first])  # 800 bytes
        del first
        assert counter.live == 1200  # the view keeps the storage
        del view
        assert counter.live == 800
        del second
        assert (counter.live, counter.peak) == (0, 1200)


def test_peak_bytes_see_the_backward_pass() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> None:
        torch.autograd.backward((x.exp() * 2).sum())

    # exp's result, the gradients of the product and of x, and two scalars
    assert peak_bytes(run, CPU) == 3 * 4_000 + 2 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_side_of_the_training_benchmark_has_the_same_gradient(family: str) -> None:
    sides = _sides(family)
    for group in (sides.five_captions, sides.lm_step):
        slow = sides.gradient(group["naive"])
        assert slow.abs().max() > 1e-6
        loss = backpropagate(group["naive"])
        for side in group.values():
            torch.testing.assert_close(sides.gradient(side), slow, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(backpropagate(side), loss, rtol=1e-9, atol=1e-12)


def test_the_five_captions_differ_and_add_up() -> None:
    sides = _sides("internvl")
    losses = [loss.detach() for loss in sides.naive()]
    assert len({float(loss) for loss in losses}) == 5
    torch.testing.assert_close(backpropagate(sides.naive), torch.stack(losses).sum())


def test_a_side_runs_the_vision_tower_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = _sides("qwen3_vl")
    visual: Any = sides.backbone.core.visual
    calls: list[int] = []
    visual.register_forward_hook(lambda *_: calls.append(1))
    for name, expected in {
        "naive": 5,
        "latent_only": 5,
        "shared_image_prefix": 1,
        "cached_vision": 0,
        "cached_keys_values": 0,
    }.items():
        calls.clear()
        backpropagate(sides.five_captions[name])
        assert len(calls) == expected, name


def _operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arithmetic_is_what_torch_counts(family: str) -> None:
    shape = replace(
        _shape(family),
        sizes=replace(_shape(family).sizes, hidden=128, ffn=256, heads=8, kv_heads=4),
    )
    backbone = random_backbone(family, shape.sizes)
    backbone.model.set_attn_implementation("eager")  # torch counts no fused attention of CPUs
    sides = Sides(backbone, shape, batch=2)
    latents = sides.latents.latents.detach().expand(2, -1, -1).clone().requires_grad_()
    image, sizes = shape.tokens.image, shape.sizes
    near = 0.02  # rotary angles are left out of the arithmetic
    assert _operations(lambda: backbone.vision_features(sides.inputs.prompts)) == pytest.approx(
        2 * flops.vision(family, sizes, shape.tokens.visual), rel=near
    )
    assert _operations(
        lambda: sides._prefix(sides.inputs.image_embeds, sides.inputs.image_positions)
    ) == pytest.approx(2 * flops.forward(sizes, image), rel=near)
    both = flops.forward(sizes, NUM_LATENTS, image) + flops.backward(sizes, NUM_LATENTS, image)
    assert _operations(
        lambda: backbone.follow(sides.kept_embeds, latents).sum().backward()  # type: ignore[no-untyped-call]
    ) == pytest.approx(2 * both, rel=near)


def test_the_arithmetic_of_published_shapes_is_the_specification() -> None:
    expected = {  # TFLOP: vision, image prefix, text prefix
        "internvl": (Tokens(256, 266, 20, 20), 0.726, 0.193, 0.014),
        "qwen3_vl": (Tokens(300, 310, 20, 20), 0.931, 0.885, 0.056),
        "qwen3_vl_4b": (Tokens(300, 310, 20, 20), 0.936, 2.281, 0.146),
        "internvl_8b": (Tokens(256, 266, 20, 20), 0.738, 3.486, 0.261),
    }
    for name, (tokens, *numbers) in expected.items():
        shape = PUBLISHED[name].shape
        pair = flops.work(shape.family, shape.sizes, tokens)
        found = [part / 1e12 for part in (pair.vision, pair.image, pair.text)]
        assert found == pytest.approx(numbers, rel=0.03), name  # it counts half of causal attention
        assert flops.limits(pair, 5)["step"] == pytest.approx(1.8, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_models_keep_the_share_of_the_vision_tower(family: str) -> None:
    def share(shape: Shape) -> float:
        pair = flops.work(shape.family, shape.sizes, shape.tokens)
        return pair.vision / pair.image

    assert share(ON_CPU[family]) == pytest.approx(share(PUBLISHED[family].shape), rel=0.05)


def _trainer(family: str, plan: Plan) -> BlockResident:
    backbone = _backbone(family)
    prompts = backbone.prompts(pictures(4, (32, 32)))
    trainer = BlockResident(backbone, prompts, plan)
    trainer.latents.double()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_schedule_computes_the_loss_of_training_in_chunks(family: str) -> None:
    trainer = _trainer(family, Plan(batch=7, chunk=3))
    trainer.encode()
    images, texts = trainer._images, trainer.texts()
    assert sum(map(len, images)) == sum(map(len, texts)) == 7
    assert max(map(len, images)) == 3
    found = torch.autograd.grad(trainer.loss(images, texts), trainer.latents.latents)[0]
    module = RetrievalModule(trainer.backbone, trainer.latents)
    whole = module([Prefix.stack(images)], [Prefix.stack(texts)])
    expected = torch.autograd.grad(whole, trainer.latents.latents)[0]
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_schedule_encodes_a_block_for_every_fifth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer("internvl", Plan(batch=4, chunk=2))
    rows: list[tuple[int, ...]] = []
    prefix = trainer.backbone.prefix

    def counted(prompts: Prompts) -> Prefix:
        rows.append(tuple(prompts.input_ids.shape))
        return prefix(prompts)

    monkeypatch.setattr(trainer.backbone, "prefix", counted)
    start = trainer.latents.latents.detach().clone()
    trainer.run(6)
    texts = [shape for shape in rows if shape == (4, TEXT_TOKENS)]
    assert len(texts) == 6
    assert len(rows) - len(texts) == 2
    assert not torch.equal(trainer.latents.latents, start)


def test_rows_are_halved_until_they_fit() -> None:
    tried: list[int] = []

    def attempt(rows: int) -> None:
        tried.append(rows)
        if rows > 70:
            raise torch.OutOfMemoryError

    assert schedule.rows_that_fit(attempt, 512) == 64
    assert tried == [512, 256, 128, 64]
    with pytest.raises(HardwareError, match="no memory left for one image"):
        schedule.rows_that_fit(lambda rows: attempt(rows + 70), 512)


def test_hours_scale_with_the_batch() -> None:
    assert schedule.coco_hours(1.0, 1024) == pytest.approx(2767 / 3600)
    assert schedule.coco_hours(1.0, 512) == pytest.approx(2 * 2767 / 3600)
    assert schedule.limit_images_per_s(PUBLISHED["internvl"]) == 833.0
    by_arithmetic = replace(PUBLISHED["internvl"], limit_images_per_s=None)
    assert schedule.limit_images_per_s(by_arithmetic) == pytest.approx(833.0, rel=0.05)


@pytest.mark.parametrize("rows", [0, 2])
def test_the_full_measurement_says_what_it_ran(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_MOST_ROWS", 8)
    model = replace(PUBLISHED["qwen3_vl"], shape=_shape("qwen3_vl"), training_pixels=(48, 32))
    plan = Plan(batch=4, chunk=2, rows=rows, steps=5)
    found = schedule.measure_full(model, _backbone("qwen3_vl", torch.bfloat16), plan)
    found = json.loads(json.dumps(found))
    assert found["model"] == "Qwen3-VL-2B"
    embed, training = found["embed"], found["train"]
    assert embed["rows"] == (rows or 8)
    assert embed["share_of_limit"] == pytest.approx(embed["images_per_s"] / 619.0)
    assert training["hours_five_coco_epochs"] == pytest.approx(training["step_s"] / 4 * 787.0578)
    assert {name: training[name] for name in ("rows", "batch", "chunk", "steps", "pixels")} == {
        "rows": rows or 4,  # a whole batch where it fits
        "batch": 4,
        "chunk": 2,
        "steps": 5,
        "pixels": [48, 32],
    }
    assert training["paper_h800_hours"] == 6.7


SIDES = {"naive", "latent_only", "shared_image_prefix", "cached_vision", "cached_keys_values"}


def test_the_result_is_json_with_every_side_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ON_CPU, "internvl", _shape("internvl"))
    result = json.loads(
        json.dumps(train.run(["--family", "internvl", "--repeats", "1", "--batch", "2"]))
    )
    found = result["internvl"]
    five = {f"five_captions_{name}" for name in SIDES - {"naive"}}
    lm_only = {"step", "step_cached_keys_values"}
    assert set(found["flop_limits"]) == five | lm_only
    assert set(found["ratios"]) == five | lm_only | {"backward", "saved_bytes"}
    assert min(found["ratios"].values()) > 0
    assert found["gradient_difference"] < 1e-5
    assert set(found["five_captions"]) == SIDES
    for name, row in found["five_captions"].items():
        assert set(row) == {
            "median_s", "saved_bytes", "held_bytes", "peak_bytes", "gradient_difference",
        }  # fmt: skip
        assert row["peak_bytes"] >= row["saved_bytes"] + row["held_bytes"] > 0, name
    naive, ours = (found["five_captions"][name] for name in ("naive", "shared_image_prefix"))
    assert naive["saved_bytes"] > ours["saved_bytes"]
    assert result["hardware"]["cpus"] >= 1


def test_held_bytes_are_those_of_the_caches() -> None:
    sides = _sides("qwen3_vl")
    hidden, layers, batch, double = 32, 3, 3, 8
    deepstack = 2
    row = 2 * layers * 1 * 16 * double  # bytes of one token's keys and values
    image = sides.inputs.prompts.mask.shape[1]
    assert sides.held_bytes == {
        "five_captions": {
            "cached_vision": batch * 4 * hidden * double * (1 + deepstack),
            "cached_keys_values": batch * row * (image + 5 * TEXT_TOKENS),
        },
        "lm_step": {"cached_keys_values": batch * row * (14 + TEXT_TOKENS)},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for hardware that must be absent")
@pytest.mark.parametrize("options", [["--device", "cuda"], ["--full"]])
def test_an_absent_gpu_is_an_error(options: list[str]) -> None:
    with pytest.raises(HardwareError, match="no CUDA GPU"):
        train.run(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for hardware that must be absent")
def test_the_module_ends_with_the_error_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jobs.bench.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", "train", "--full"])
    with pytest.raises(SystemExit, match=r"error: .* torch sees no CUDA GPU"):
        runpy.run_module("jobs.bench.__main__", run_name="__main__")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_schedule_runs_on_a_gpu() -> None:
    shape = _shape("qwen3_vl")
    model = replace(PUBLISHED["qwen3_vl"], shape=shape, training_pixels=(48, 32))
    backbone = shape.load(torch.bfloat16, "cuda")
    found = schedule.measure_full(model, backbone, Plan(batch=8, chunk=4, steps=5))
    assert found["train"]["rows"] == 8
    assert found["train"]["peak_bytes"] > 0


def test_full_size_on_a_cpu_is_an_error() -> None:
    with pytest.raises(HardwareError, match="--full needs a GPU"):
        train.run(["--full", "--device", "cpu"])


def test_a_family_without_a_scaled_shape_asks_for_full() -> None:
    with pytest.raises(ConfigError, match="add --full"):
        train.run(["--family", "internvl_8b"])


def test_without_a_gpu_the_plan_is_printed_and_no_figures() -> None:
    planned = train.gpu_plan(Plan(steps=7), reason="torch sees no CUDA GPU")
    assert planned["measured"] is False
    assert planned["command"] == "python -m jobs.bench train --full"
    assert {run["model"]: run["paper_h800_hours"] for run in planned["would_run"].values()} == {
        "InternVL3-1B": 3.9,
        "Qwen3-VL-2B": 6.7,
    }
    assert {run["steps"] for run in planned["would_run"].values()} == {7}


WITHOUT = """
import runpy, sys
absent = set(sys.argv.pop(1).split(","))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in absent
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
for name in absent:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")
runpy.run_module("jobs.bench", run_name="__main__", alter_sys=True)
"""
ABSENT = (
    "ray", "deepspeed", "faiss", "pyarrow", "pydantic", "peft", "typer", "rich", "fastapi",
    "matplotlib", "pandas", "accelerate", "s3fs", "tensorboard",
)  # fmt: skip


def test_the_benchmark_runs_where_there_is_little_more_than_torch_and_transformers() -> None:
    command = [sys.executable, "-c", WITHOUT, ",".join(ABSENT)]
    options = ["train", "--family", "tiny", "--batch", "2", "--repeats", "1"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "five_captions" in json.loads(done.stdout)["tiny"]
