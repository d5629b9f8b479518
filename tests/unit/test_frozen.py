"""Training moves the latent queries and the temperature, and nothing else, by not one bit."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from slq.errors import ConfigError
from slq.latent_queries import MAX_TEMPERATURE, MIN_TEMPERATURE, LatentQueries
from slq.losses import info_nce
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, picture
from tests.naive import chat_inputs, naive_logits

IMAGES = [Item(image=picture(2, 3, seed=seed)) for seed in range(4)]
TEXTS = [
    Item(text=text) for text in ("a red dog", "two blue cats", "a small dog", "white background")
]
QUESTION = Item(text="a small red dog", image=picture(3, 2))


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_training_leaves_the_backbone_and_its_logits_bit_identical(family: str) -> None:
    backbone = BUILDERS[family]()
    latents = LatentQueries(4, HIDDEN, embedding_std=backbone.embedding_std)
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    logits = naive_logits(backbone, QUESTION)
    start = latents.latents.detach().clone()
    optimiser = torch.optim.AdamW(latents.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        loss = info_nce(
            latents.embed_items(backbone, IMAGES),
            latents.embed_items(backbone, TEXTS),
            latents.temperature,
        )
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert (latents.latents - start).abs().max() > 1e-2
    assert float(latents.temperature.detach()) != pytest.approx(0.07, rel=1e-6)
    after = backbone.model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(naive_logits(backbone, QUESTION), logits)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_only_trainable_parameters_are_the_latents_and_the_temperature(family: str) -> None:
    backbone = BUILDERS[family]()
    latents = LatentQueries(4, HIDDEN)
    trainable = {
        name
        for module in (backbone.model, latents)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert trainable == {"latents", "log_temperature"}
    assert sum(parameter.numel() for parameter in latents.parameters()) == 4 * HIDDEN + 1
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_a_training_step_lowers_the_loss(family: str) -> None:
    backbone = BUILDERS[family]()
    latents = LatentQueries(4, HIDDEN, embedding_std=backbone.embedding_std)
    optimiser = torch.optim.Adam(latents.parameters(), lr=2e-2)
    prefixes = [backbone.prefix(backbone.prompts(items)) for items in (IMAGES, TEXTS)]
    losses = []
    for _ in range(12):
        vectors = [latents.embed(backbone, prefix) for prefix in prefixes]
        loss = info_nce(vectors[0], vectors[1], latents.temperature)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_pooling_reads_after_the_final_norm(family: str) -> None:
    backbone = BUILDERS[family](double=True)
    latents = LatentQueries(4, HIDDEN, embedding_std=0.2).double()
    norm = backbone.decoder.norm
    seen: list[Tensor] = []
    hook = norm.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    vector = latents.embed_items(backbone, [QUESTION])[0]
    hook.remove()
    before, after = (states[0, -4:].mean(0) for states in seen[-2:])
    torch.testing.assert_close(vector, after / after.norm(), rtol=0, atol=1e-10)
    assert (vector - before / before.norm()).norm() > 1e-2


def test_the_prefix_alone_gives_the_logits_of_the_base_model() -> None:
    backbone = BUILDERS["qwen3_vl"](double=True)
    prefix = backbone.prefix(backbone.prompts([QUESTION]))
    head = backbone.model.get_output_embeddings()
    torch.testing.assert_close(
        head(prefix.last_hidden)[0], naive_logits(backbone, QUESTION), rtol=0, atol=1e-10
    )
    assert chat_inputs(backbone, QUESTION)["input_ids"].tolist() == (
        backbone.prompts([QUESTION]).input_ids.tolist()
    )


def test_the_temperature_stays_inside_its_bounds_and_starts_where_it_is_told() -> None:
    latents = LatentQueries(2, HIDDEN, temperature=0.07)
    assert float(latents.temperature.detach()) == pytest.approx(0.07)
    for raw, expected in ((-50.0, MIN_TEMPERATURE), (50.0, MAX_TEMPERATURE)):
        latents.log_temperature.data.fill_(raw)
        assert float(latents.temperature.detach()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("init", "std"), [("embedding", 0.5), ("normal", 1 / math.sqrt(64)), ("zeros", 0.0)]
)
def test_latents_start_at_the_scale_they_promise(init: str, std: float) -> None:
    values = LatentQueries(200, 64, init=init, embedding_std=0.5).latents.detach().numpy()  # type: ignore[arg-type]
    assert np.std(values) == pytest.approx(std, rel=0.05)
    assert values.dtype == np.float32


def test_the_same_seed_gives_the_same_latents_without_touching_the_global_generator() -> None:
    state = torch.get_rng_state()
    first, second = LatentQueries(3, 8, seed=5), LatentQueries(3, 8, seed=5)
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, LatentQueries(3, 8, seed=6).latents)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_init_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'ones' is unknown; choose one of embedding, normal, zeros"
    ):
        LatentQueries(2, 4, init="ones")  # type: ignore[arg-type]
