"""Gathering with gradient: averaged over ranks it is the one-process gradient of the whole batch.

Real gloo processes, three spawns in all; every rank runs every case and writes what it found.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from slq.collectives import all_agree, gather_rows, rank, world_size
from slq.losses import info_nce

SIZES = {1: [7], 2: [2, 5], 4: [3, 1, 4, 2]}  # uneven local batches
WIDTH = 6


def inputs(num_ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_ranks)
    shape = (2, sum(SIZES[num_ranks]), WIDTH)
    images, texts = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return images, texts


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """A weight that both sides share, as the latents are, and a log temperature."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return [weight.requires_grad_(), torch.tensor(-2.0, dtype=dtype).requires_grad_()]


def gradients(images: Tensor, texts: Tensor, gather: Callable[[Tensor], Tensor]) -> list[Tensor]:
    weight, log_temperature = parameters(images.dtype)
    vectors = [gather(F.normalize(side @ weight, dim=1)) for side in (images, texts)]
    loss = info_nce(vectors[0], vectors[1], log_temperature.exp())
    return [loss.detach(), *torch.autograd.grad(loss, [weight, log_temperature])]


def _averaged(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value / world_size()


def _worker(number: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=num_ranks
    )
    start = sum(SIZES[num_ranks][:number])
    own = slice(start, start + SIZES[num_ranks][number])
    found: dict[str, Tensor] = {"rank": torch.tensor([rank(), world_size()])}
    for name, dtype in (("single", torch.float32), ("double", torch.float64)):
        images, texts = inputs(num_ranks, dtype)
        for key, value in zip(KEYS, gradients(images[own], texts[own], gather_rows), strict=True):
            found[f"{name}.{key}"] = _averaged(value.clone())
    images, texts = inputs(num_ranks, torch.float64)
    found["rows"] = gather_rows(images[own]).detach().clone()
    local = images[own].clone().requires_grad_()
    other = texts[own].clone().requires_grad_()
    # Addition hands the very same gradient tensor to both gathers.
    total = (gather_rows(local) + gather_rows(other)).sin().sum()
    for name, value in zip(
        ("local", "other"), torch.autograd.grad(total, [local, other]), strict=True
    ):
        found[f"sum.{name}"] = value.clone()
    found["agree"] = torch.tensor([all_agree(True), all_agree(number != 0), all_agree(False)])
    save_file(found, f"{folder}/rank{number}.safetensors")
    dist.destroy_process_group()


KEYS = ("loss", "weight", "log_temperature")


@pytest.fixture(scope="module", params=sorted(SIZES))
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(_worker, args=(request.param, str(folder)), nprocs=request.param)
    return [load_file(folder / f"rank{number}.safetensors") for number in range(request.param)]


@pytest.mark.parametrize(("name", "tolerance"), [("single", 1e-6), ("double", 1e-12)])
def test_averaged_gradients_equal_those_of_one_process_with_the_whole_batch(
    found: list[dict[str, Tensor]], name: str, tolerance: float
) -> None:
    images, texts = inputs(len(found), torch.float64)
    truth = dict(zip(KEYS, gradients(images, texts, lambda rows: rows), strict=True))
    for ours in found:
        for key in KEYS:
            error = (ours[f"{name}.{key}"].double() - truth[key]).norm() / truth[key].norm()
            assert float(error) < tolerance, key


def test_rows_of_all_ranks_arrive_in_rank_order(found: list[dict[str, Tensor]]) -> None:
    images, _ = inputs(len(found), torch.float64)
    assert all(torch.equal(ours["rows"], images) for ours in found)
    assert [ours["rank"].tolist() for ours in found] == [[n, len(found)] for n in range(len(found))]


def test_two_gathers_that_meet_in_a_sum_get_a_right_gradient_each(
    found: list[dict[str, Tensor]],
) -> None:
    images, texts = inputs(len(found), torch.float64)
    truth = (images + texts).cos() * len(
        found
    )  # every rank computes the same loss, and backward sums them
    for side in ("sum.local", "sum.other"):
        ours = torch.cat([one[side] for one in found])
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_ranks_agree_only_when_all_do(found: list[dict[str, Tensor]]) -> None:
    assert all(ours["agree"].tolist() == [True, False, False] for ours in found)


def test_without_a_process_group_gathering_is_the_identity() -> None:
    local = torch.randn(3, 2)
    assert gather_rows(local) is local
    assert (rank(), world_size()) == (0, 1)
    assert all_agree(True)
    assert not all_agree(False)
