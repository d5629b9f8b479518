"""LoRA and full fine-tuning: what is trained, that it starts as the model was, and that folders give it back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from slq.artifacts import load_adapter, save_adapter, trained_tensors
from slq.backbones import load_backbone
from slq.backbones.base import Backbone
from slq.encoder import Encoder
from slq.errors import ArtifactError, ConfigError
from slq.finetuning import LORA_TARGETS, TunedBackbone
from slq.losses import info_nce
from slq.schema import Item
from tests.families import BUILDERS, picture

Method = Literal["lora", "full"]
METHODS: tuple[Method, ...] = ("lora", "full")
ITEMS = [Item(text="a fox"), Item(image=picture(3, 2)), Item(text="two red apples left of a dog")]


def lora_values(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """r x (in + out) of the seven maps of every layer, r = 8."""
    queries, keys = heads * head_dim, kv_heads * head_dim
    maps = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    maps += [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    return layers * 8 * sum(a + b for a, b in maps)


def test_the_count_is_the_papers() -> None:
    """4.40 / 8.72 / 16.52 / 20.19 M for InternVL3-1B, Qwen3-VL-2B, Qwen3-VL-4B, InternVL3-8B (poster, table 3)."""
    counts = [
        lora_values(24, 896, 4864, 14, 2, 64),
        lora_values(28, 2048, 6144, 16, 8, 128),
        lora_values(36, 2560, 9728, 32, 8, 128),
        lora_values(28, 3584, 18944, 28, 4, 128),
    ]
    assert [round(count / 1e6, 2) for count in counts] == [4.40, 8.72, 16.52, 20.19]


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_lora_trains_the_seven_maps_of_every_language_layer_and_the_temperature(
    build: Callable[..., Backbone],
) -> None:
    backbone = build()
    config = backbone.model.config.get_text_config()
    tuned = TunedBackbone(backbone, "lora")
    tensors = trained_tensors(tuned)
    expected = lora_values(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    assert sum(tensor.numel() for tensor in tensors.values()) == expected + 1
    names = [name for name in tensors if name != "log_temperature"]
    assert all(any(f".{target}.lora_" in name for target in LORA_TARGETS) for name in names)
    assert not [name for name in names if "vision" in name or "visual" in name]


def test_full_fine_tuning_trains_all_but_the_head() -> None:
    backbone = BUILDERS["qwen3_vl"]()
    tuned = TunedBackbone(backbone, "full")
    core = {id(parameter) for parameter in backbone.core.parameters()}
    trained = {id(p) for p in tuned.parameters() if p.requires_grad} - {id(tuned.log_temperature)}
    assert trained == core


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_baseline_is_the_zero_shot_last_token(method: Method) -> None:
    backbone = BUILDERS["qwen3_vl"]()
    zero_shot = Encoder(backbone).encode(ITEMS)
    tuned = TunedBackbone(backbone, method, gradient_checkpointing=True)
    np.testing.assert_allclose(Encoder(backbone, tuned).encode(ITEMS), zero_shot, atol=1e-6)
    direct = tuned.embed(backbone, backbone.prompts(ITEMS)).detach().numpy()
    np.testing.assert_allclose(direct, zero_shot, atol=1e-6)


def trained_a_little(method: Method, **options: Any) -> tuple[Backbone, TunedBackbone]:
    backbone = load_backbone("tiny")
    tuned = TunedBackbone(backbone, method, **options)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=2.0)
    for _ in range(2):
        texts = tuned.embed(backbone, backbone.prompts([Item(text="a fox"), Item(text="a bee")]))
        images = tuned.embed(
            backbone, backbone.prompts([Item(image=picture(6, 6, n)) for n in (1, 2)])
        )
        optimiser.zero_grad()
        info_nce(images, texts, tuned.temperature).backward()
        optimiser.step()
    return backbone, tuned


@pytest.mark.parametrize("method", METHODS)
def test_recomputing_layers_gives_the_same_weights(method: Method) -> None:
    _, plain = trained_a_little(method)
    _, recomputed = trained_a_little(method, gradient_checkpointing=True)
    for (name, ours), theirs in zip(
        trained_tensors(recomputed).items(), trained_tensors(plain).values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_baseline_comes_back_from_its_folder(method: Method, tmp_path: Path) -> None:
    backbone, tuned = trained_a_little(method)
    folder = save_adapter(tmp_path / "adapter", backbone, tuned)
    ours = Encoder(backbone, tuned)
    theirs = Encoder.from_pretrained(folder)
    np.testing.assert_array_equal(theirs.encode(ITEMS), ours.encode(ITEMS))
    assert theirs.fingerprint == ours.fingerprint
    zero_shot = Encoder(load_backbone("tiny"))
    assert np.abs(zero_shot.encode(ITEMS) - ours.encode(ITEMS)).max() > 1e-3
    assert zero_shot.fingerprint != ours.fingerprint
    assert "baseline" in (folder / "README.md").read_text()


def test_a_model_that_was_trained_in_bfloat16_comes_back_with_its_fingerprint(
    tmp_path: Path,
) -> None:
    backbone = load_backbone("tiny", dtype="bfloat16")
    tuned = TunedBackbone(backbone, "full")
    tuned.log_temperature.data = tuned.log_temperature.data.bfloat16()  # as DeepSpeed makes it
    folder = save_adapter(tmp_path / "adapter", backbone, tuned)
    assert Encoder.from_pretrained(folder).fingerprint == Encoder(backbone, tuned).fingerprint


def test_a_temperature_beyond_its_bound_can_come_back() -> None:
    tuned = TunedBackbone(BUILDERS["qwen3_vl"](), "lora")
    tuned.log_temperature.data.fill_(-9.0)
    assert tuned.temperature.item() == pytest.approx(0.01)
    tuned.temperature.backward()
    assert tuned.log_temperature.grad is not None
    assert tuned.log_temperature.grad.item() > 0


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    backbone, tuned = trained_a_little("lora")
    folder = save_adapter(tmp_path / "adapter", backbone, tuned)
    other = save_adapter(tmp_path / "other", *trained_a_little("full"))
    weights = "adapter_model.safetensors"
    (folder / weights).write_bytes((other / weights).read_bytes())
    with pytest.raises(ArtifactError, match="damaged: tensors"):
        load_adapter(folder, load_backbone("tiny"))


def test_lora_needs_the_seven_maps() -> None:
    backbone = BUILDERS["qwen3_vl"]()
    for layer in backbone.decoder.layers:  # type: ignore[union-attr]
        del layer.mlp.up_proj
    with pytest.raises(ConfigError, match="linear maps up_proj"):
        TunedBackbone(backbone, "lora")
