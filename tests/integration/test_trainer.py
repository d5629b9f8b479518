"""The training loop on two gloo processes, without Ray: what is not finite or not readable, and where a run goes on."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from pipelines.engine import peak_memory_bytes
from pipelines.negatives import MinedNegatives
from pipelines.pairs import Pairs
from pipelines.recipe import Recipe
from pipelines.selection import ChosenPairs
from pipelines.trainer import Trainer
from slq.backbones.base import Backbone, Prompts
from slq.backbones.vision import VisionFeatures
from slq.errors import MediaError, TrainingError
from slq.training import RetrievalModule
from tests.integration.runs import changed, free_port

pytestmark = pytest.mark.slow
Found = dict[str, dict[str, Any]]
Fault = Callable[[int, Tensor, Any], Tensor]  # (step, loss, temperature parameter) -> loss


class Broken(ChosenPairs):
    """Pairs of which some turn out to be unreadable."""

    bad: tuple[int, ...] = ()

    def item(self, pair: int, side: Any) -> Any:
        if pair in self.bad and side == "query":
            raise MediaError("corrupt", "the image is broken")
        return super().item(pair, side)


def not_a_number(step: int, loss: Tensor, _: Any) -> Tensor:
    return loss * float("nan") if step == 2 and os.environ["RANK"] == "1" else loss


def bad_gradient(step: int, loss: Tensor, parameter: Any) -> Tensor:
    """A finite loss whose gradient is not."""
    return loss + torch.sqrt((parameter * 0).sum()) if step == 2 else loss


SMALL = {"num_latents": 2, "pooling": "last", "seed": 5}
MINED = {"negatives": 2}


def mined() -> MinedNegatives:
    """Two negatives of each pair, of every seventh only one."""
    pairs = np.array([[(n + 1) % 56, (n + 9) % 56] for n in range(56)])
    pairs[::7, 1] = -1
    margins = np.linspace(-3, 3, 56 * 3, dtype=np.float32).reshape(56, 3)
    margins[::7, 2] = np.nan
    return MinedNegatives(pairs, margins)


class Case:
    """One run in this process's rank; what it found is written by rank 0."""

    def __init__(self, recipe: Recipe, rank: int, found: Found) -> None:
        self._recipe, self._rank, self._found = recipe, rank, found

    def run(
        self,
        name: str,
        *,
        fault: Fault | None = None,
        bad: tuple[int, ...] = (),
        held_bad: tuple[int, ...] = (),
        checkpoint: Path | None = None,
        adapter: dict[str, Any] | None = None,
        wrong: MinedNegatives | None = None,
        **train: Any,
    ) -> None:
        kept = self._recipe.storage.dir / name
        sections = {"train": train, "adapter": adapter or {}, "storage": {"dir": kept}}
        recipe = changed(self._recipe, **sections)
        pairs = Pairs(recipe.data.path("train"))
        reader = Broken(pairs, np.arange(56))
        reader.bad = bad
        held = Broken(pairs, np.arange(56, 64))
        held.bad = held_bad
        lines: list[str] = []
        trainer = Trainer(
            recipe,
            reader,
            held,
            rank=self._rank,
            world=2,
            say=lines.append,
            negatives=wrong,
        )

        def report(metrics: dict[str, float], folder: Path | None) -> None:
            if folder is not None:
                shutil.copytree(folder, kept / f"step{metrics['step']:.0f}")

        error = ""
        towers = 0
        see = Backbone.vision_features

        def vision_features(backbone: Backbone, prompts: Prompts) -> list[VisionFeatures]:
            nonlocal towers
            towers += bool(prompts.vision)  # captions have none
            return see(backbone, prompts)

        plain = RetrievalModule.forward
        calls = iter(range(100))

        def forward(module: Any, *sides: Any) -> Tensor:
            loss = plain(module, *sides)
            parameter = module.adapter.log_temperature
            return loss if fault is None else fault(next(calls), loss, parameter)

        RetrievalModule.forward = forward  # type: ignore[method-assign]
        Backbone.vision_features = vision_features  # type: ignore[method-assign]
        try:
            trainer.run(checkpoint, report)
        except TrainingError as raised:
            error = str(raised)
        finally:
            RetrievalModule.forward = plain  # type: ignore[method-assign]
            Backbone.vision_features = see  # type: ignore[method-assign]
        self._found[name] = {
            "steps": trainer.steps,
            "error": error,
            "lines": lines,
            "towers": towers,
        }


def _rank(rank: int, plain_recipe: dict[str, Any], folder: str, port: int) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, 2, port)), strict=True))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    found: Found = {}
    case = Case(Recipe.model_validate(plain_recipe), rank, found)
    case.run("whole")
    case.run("resumed", checkpoint=Path(folder) / "whole" / "step2")
    for name in ("features kept", "features read"):
        case.run(name, vision_cache=Path(folder) / "features", cache_bytes=0)
    case.run("chunks", chunk_rows=3)
    case.run("sharded", zero_stage=3)
    case.run("skipped", fault=not_a_number, non_finite="skip")
    for stage in (0, 2, 3):
        case.run(f"undone{stage}", fault=bad_gradient, non_finite="skip", zero_stage=stage)
    case.run("poisoned", fault=bad_gradient, zero_stage=0)
    case.run("halted", fault=not_a_number)
    always = lambda _, loss, __: loss * float("nan")  # noqa: E731
    case.run("too often", fault=always, non_finite="skip", max_skipped=3)
    case.run("broken", bad=(3, 11), max_error_share=0.1)
    case.run("held broken", held_bad=(0, 7))
    case.run("all broken", bad=tuple(range(40)), max_error_share=0.1)
    case.run("small", adapter=SMALL, zero_stage=0)
    both = {"variants": {"small": SMALL}}
    case.run("both", adapter=both, zero_stage=0)
    at_two = Path(folder) / "both" / "step2"
    case.run("both resumed", adapter=both, zero_stage=0, checkpoint=at_two)
    case.run("mined", wrong=mined(), distillation=0.5, **MINED)
    case.run("mined chunks", wrong=mined(), distillation=0.5, chunk_rows=3, **MINED)
    case.run("mined broken", wrong=mined(), bad=(3, 11), max_error_share=0.1, **MINED)
    case.run("mined lora", wrong=mined(), adapter={"method": "lora"}, num_steps=2, **MINED)
    Path(folder, f"found{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def runs(
    scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Found, Found, Path]]:
    folder = tmp_path_factory.mktemp("trainer")
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        adapter={"num_latents": 4},
        train={
            "num_steps": 5,
            "global_batch": 16,
            "warmup_steps": 1,
            "checkpoint_every": 2,
            "eval_every": 5,
        },
        storage={"dir": folder},
    )
    arguments = (recipe.model_dump(mode="json"), str(folder), free_port())
    mp.spawn(_rank, args=arguments, nprocs=2, join=True)
    first, second = (json.loads((folder / f"found{n}.json").read_text()) for n in range(2))
    return first, second, folder


def losses(found: Found, name: str) -> list[float]:
    return [step["loss"] for step in found[name]["steps"]]


def latents(folder: Path, name: str, step: int) -> Tensor:
    return load_file(folder / name / f"step{step}" / "adapter" / "adapter_model.safetensors")[
        "latents"
    ]


def test_both_workers_see_the_same_losses_and_the_run_learns(
    runs: tuple[Found, Found, Path],
) -> None:
    first, second, _ = runs
    assert losses(first, "whole") == losses(second, "whole")
    assert first["whole"]["error"] == ""
    assert losses(first, "whole")[-1] < losses(first, "whole")[0]


def test_a_resumed_run_has_the_losses_and_the_weights_of_a_whole_one(
    runs: tuple[Found, Found, Path],
) -> None:
    first, _, folder = runs
    assert losses(first, "resumed") == losses(first, "whole")
    assert first["resumed"]["lines"][0] == "train goes on after step 2"
    assert torch.equal(latents(folder, "resumed", 5), latents(folder, "whole", 5))


@pytest.mark.parametrize("name", ["chunks", "sharded"])
def test_chunks_and_sharded_weights_learn_the_same(
    runs: tuple[Found, Found, Path], name: str
) -> None:
    assert losses(runs[0], name) == pytest.approx(losses(runs[0], "whole"), rel=1e-5)


def test_a_run_with_stored_vision_features_learns_the_same_without_the_tower(
    runs: tuple[Found, Found, Path],
) -> None:
    for name in ("features kept", "features read"):
        assert losses(runs[0], name) == pytest.approx(losses(runs[0], "whole"), rel=1e-5)
    for found in runs[:2]:
        assert found["features kept"]["towers"] > 0
        assert found["features read"]["towers"] == 0
    assert len(list((runs[2] / "features").glob("*/*"))) > 16


@pytest.mark.parametrize("name", ["skipped", "undone0", "undone2", "undone3"])
def test_a_step_that_is_not_finite_is_left_out_by_all_workers(
    runs: tuple[Found, Found, Path], name: str
) -> None:
    for found in runs[:2]:
        steps = found[name]["steps"]
        assert [step["updated"] for step in steps] == [1, 1, 0, 1, 1]
        assert steps[-1]["skipped"] == 1
        assert np.isfinite([step["loss"] for step in steps[3:]]).all()
    assert torch.isfinite(latents(runs[2], name, 5)).all()
    # steps 1 and 2 are those of the whole run, and the third changed nothing
    near = {"undone0": 1e-5, "undone3": 1e-5}.get(name, 0.0)  # ZeRO stages round apart
    for ours, reference in ((slice(2), "whole"), (slice(3, None), "skipped")):
        expected = pytest.approx(losses(runs[0], reference)[ours], rel=near, abs=0)
        assert losses(runs[0], name)[ours] == expected
    assert all(step["gradient_norm"] > 0 for step in runs[0][name]["steps"] if step["updated"])


def test_by_default_the_run_ends_and_the_last_checkpoint_stays(
    runs: tuple[Found, Found, Path],
) -> None:
    for found in runs[:2]:
        assert "the loss is not finite at step 3" in found["halted"]["error"]
        assert len(losses(found, "halted")) == 2
        assert "the gradient is not finite at step 3" in found["poisoned"]["error"]
        assert "not finite at step 4 (4 such steps)" in found["too often"]["error"]
    assert torch.isfinite(latents(runs[2], "halted", 2)).all()


def test_a_pair_that_breaks_during_the_run_is_replaced_on_all_workers(
    runs: tuple[Found, Found, Path],
) -> None:
    first, second, _ = runs
    assert first["broken"]["error"] == second["broken"]["error"] == ""
    assert losses(first, "broken") == losses(second, "broken")
    assert first["broken"]["steps"][-1]["unusable"] in (1, 2)
    assert losses(first, "broken") != losses(first, "whole")
    for found in (first, second):
        assert "turned out to be unusable" in found["all broken"]["error"]


def test_held_out_pairs_that_cannot_be_read_are_left_out(runs: tuple[Found, Found, Path]) -> None:
    for found in runs[:2]:
        assert found["held broken"]["error"] == ""
        assert losses(found, "held broken") == losses(found, "whole")
        assert 0 <= found["held broken"]["steps"][-1]["text_to_image/hit@1"] <= 1


def test_the_last_step_is_measured_on_pairs_held_out(runs: tuple[Found, Found, Path]) -> None:
    first, second, _ = runs
    last, other = first["whole"]["steps"][-1], second["whole"]["steps"][-1]
    measured = {name for name in last if "/" in name and not name.startswith("seconds/")}
    assert {"text_to_image/hit@1", "image_to_text/hit@1"} <= measured
    assert all(last[name] == other[name] for name in measured)
    assert not measured & set(first["whole"]["steps"][0])
    history = (runs[2] / "whole" / "train" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [1, 2, 3, 4, 5]


def test_a_variant_learns_what_it_learns_alone(runs: tuple[Found, Found, Path]) -> None:
    """Each is clipped by its own gradient, as the first steps of these runs are."""
    found, _, folder = runs
    alone, together = (found[name]["steps"] for name in ("small", "both"))
    assert [step["gradient_norm"] > 1.0 for step in alone[:3]] == [True] * 3
    for name in ("loss", "temperature", "gradient_norm", "text_to_image/hit@5"):
        values = [
            [step[key] for step in steps if key in step]
            for steps, key in (
                (alone, name),
                (together, f"variants/small/{name}"),
            )
        ]
        np.testing.assert_allclose(*values, rtol=1e-5)
    weights = [
        load_file(folder / path / "adapter_model.safetensors")["latents"]
        for path in ("small/step5/adapter", "both/step5/variants/small")
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert weights[0].shape == (2, 192)
    np.testing.assert_allclose(losses(found, "both"), losses(found, "whole"), rtol=1e-5)


def test_a_run_with_variants_resumes(runs: tuple[Found, Found, Path]) -> None:
    found, _, folder = runs
    whole, resumed = found["both"]["steps"], found["both resumed"]["steps"]
    for name in ("loss", "variants/small/loss", "variants/small/temperature"):
        assert [step[name] for step in resumed] == [step[name] for step in whole]
    for part in ("adapter", "variants/small"):
        files = [
            (folder / run / "step5" / part / "adapter_model.safetensors").read_bytes()
            for run in ("both", "both resumed")
        ]
        assert files[0] == files[1]


def test_mined_negatives_raise_the_loss_alike_on_all_workers(
    runs: tuple[Found, Found, Path],
) -> None:
    first, second, _ = runs
    assert first["mined"]["error"] == ""
    assert losses(first, "mined") == losses(second, "mined")
    assert losses(first, "mined")[0] > losses(first, "whole")[0] + 0.05
    np.testing.assert_allclose(losses(first, "mined chunks"), losses(first, "mined"), rtol=1e-5)
    assert len(losses(first, "mined lora")) == 2


def test_a_negative_that_breaks_during_the_run_is_left_out_on_all_workers(
    runs: tuple[Found, Found, Path],
) -> None:
    first, second, _ = runs
    assert first["mined broken"]["error"] == ""
    assert losses(first, "mined broken") == losses(second, "mined broken")
    assert first["mined broken"]["steps"][-1]["unusable"] == 2
    assert np.isfinite(losses(first, "mined broken")).all()


def test_the_peak_of_memory_is_in_bytes_and_only_rises(runs: tuple[Found, Found, Path]) -> None:
    peaks = [step["peak_memory_bytes"] for step in runs[0]["whole"]["steps"]]
    assert peaks[0] > 2**27
    assert peaks == sorted(peaks)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_memory_is_what_the_kernel_says() -> None:
    found = peak_memory_bytes(torch.device("cpu"))
    status = Path("/proc/self/status").read_text().splitlines()
    told = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    # the kernel counts with some slack, and a process begins with the peak of the one that started it
    assert 0.95 * told <= found <= 64 * told
