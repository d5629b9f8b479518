"""The DeepSpeed engine on gloo processes: every ZeRO stage and method learns the same, and states move between them."""

import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from pipelines.engine import load_training_state, make_engine, training_state
from pipelines.loading import backbone_of, untrained_adapter
from pipelines.pairs import Pairs
from pipelines.recipe import Recipe
from pipelines.selection import ChosenPairs
from slq.errors import ConfigError
from slq.training import PrefixSource, PromptSource
from tests.families import BUILDERS, save
from tests.integration.runs import free_port

pytestmark = pytest.mark.slow
METHODS, STAGES = ("slq", "lora", "full"), (0, 1, 2, 3)
ROWS, STEPS, SAVED_AT = 4, 4, 2


class Run:
    """A few steps on one batch, in this process's rank."""

    def __init__(
        self, method: str, stage: int, scenes: Path, model: str, rank: int, world: int
    ) -> None:
        recipe = Recipe.model_validate(
            {
                "backbone": {"name": model},
                "train": {"zero_stage": stage, "lr": 1e-3},
                "adapter": {"method": method, "num_latents": 4},
            }
        )
        backbone = backbone_of(recipe)
        self.engine = make_engine(recipe, backbone, untrained_adapter(recipe, backbone), world)
        pairs = ChosenPairs(Pairs(scenes / "train.parquet"), np.arange(ROWS))
        self._source: Any = (
            PrefixSource(backbone, pairs, cache_bytes=0 if stage == 3 else 2**30)
            if method == "slq"
            else PromptSource(backbone, pairs)
        )
        self._mine = list(range(ROWS))[rank * ROWS // world : (rank + 1) * ROWS // world]

    def step(self) -> float:
        loss = self.engine(self._source.queries(self._mine), self._source.positives(self._mine))
        self.engine.backward(loss)
        self.engine.step()
        return float(loss)


def _rank(rank: int, world: int, scenes: str, folder: str, port: int) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, port)), strict=True))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for method, stage in product(METHODS, STAGES):
        run = Run(method, stage, Path(scenes), f"{folder}/model", rank, world)
        if world == 1:  # goes on where two workers of ZeRO-2 were
            load_training_state(run.engine, load_file(f"{folder}/{method}.safetensors"))
            found[f"{method}-{stage}"] = [run.step() for _ in range(STEPS - SAVED_AT)]
            continue
        losses = [run.step() for _ in range(SAVED_AT)]
        state = training_state(run.engine)
        if stage == 2 and rank == 0:
            save_file(state, f"{folder}/{method}.safetensors")
        losses += [run.step() for _ in range(STEPS - SAVED_AT)]
        load_training_state(run.engine, state)
        found[f"{method}-{stage}"] = losses
        found[f"{method}-{stage}-again"] = [run.step() for _ in range(STEPS - SAVED_AT)]
    if rank == 0:
        Path(folder, f"losses-{world}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def losses(
    scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, dict[str, list[float]]]]:
    folder = tmp_path_factory.mktemp("engines")
    save(
        BUILDERS["qwen3_vl"](), folder / "model"
    )  # ZeRO-3 takes seconds a step with the shipped one's many modules
    found = {}
    for world in (2, 1):
        mp.spawn(
            _rank, args=(world, str(scenes_dir), str(folder), free_port()), nprocs=world, join=True
        )
        found[world] = json.loads((folder / f"losses-{world}.json").read_text())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_zero_stage_gives_the_same_losses(
    losses: dict[int, dict[str, list[float]]], method: str
) -> None:
    reference = losses[2][f"{method}-0"]
    assert reference[-1] < reference[0]  # something was learned
    for stage in STAGES[1:]:
        assert losses[2][f"{method}-{stage}"] == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize(("method", "stage"), list(product(METHODS, STAGES)))
def test_a_state_put_back_gives_the_same_losses_bit_for_bit(
    losses: dict[int, dict[str, list[float]]], method: str, stage: int
) -> None:
    name = f"{method}-{stage}"
    assert losses[2][f"{name}-again"] == losses[2][name][SAVED_AT:]


@pytest.mark.parametrize(("method", "stage"), list(product(METHODS, STAGES)))
def test_one_worker_of_any_stage_goes_on_where_two_were(
    losses: dict[int, dict[str, list[float]]], method: str, stage: int
) -> None:
    expected = losses[2][f"{method}-2"][SAVED_AT:]
    assert losses[1][f"{method}-{stage}"] == pytest.approx(expected, rel=1e-5)


def test_bfloat16_weights_need_master_copies() -> None:
    recipe = Recipe.model_validate(
        {
            "backbone": {"dtype": "bfloat16"},
            "adapter": {"method": "full"},
            "train": {"zero_stage": 0},
        }
    )
    backbone = backbone_of(recipe)
    with pytest.raises(ConfigError, match=r"set train\.zero_stage to 1, 2 or 3"):
        make_engine(recipe, backbone, untrained_adapter(recipe, backbone), 1)
