"""SLQ's baselines: LoRA and full fine-tuning, which change the model and read the last token (spec: SLQ section 1)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from slq.backbones.base import Backbone, Prompts
from slq.errors import ConfigError
from slq.latent_queries import bounded_temperature
from slq.pooling import unit_norm

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear maps of a language-model layer."""


class TunedBackbone(nn.Module):
    """A backbone whose own weights are trained, wholly or by LoRA; the embedding is the last token's state.

    The backbone is changed in place: whoever shares it sees the tuned model.

    Args:
        backbone: Changed from now on.
        method: `lora` or `full`.
        rank: Of LoRA.
        alpha: LoRA's update is scaled by alpha / rank.
        temperature: Where the learnable temperature starts.
        seed: Of LoRA's initial values.
        gradient_checkpointing: Recompute layers in the backward pass.

    Raises:
        ConfigError: The language model lacks one of the seven maps.
    """

    pooling: Literal["last_token"] = "last_token"

    def __init__(
        self,
        backbone: Backbone,
        method: Literal["lora", "full"],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        temperature: float = 0.07,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.method = method
        self.rank, self.alpha = rank, alpha
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(temperature)], device=backbone.device)
        )
        if method == "lora":
            _inject_lora(backbone.decoder, rank, alpha, seed)
        else:
            backbone.core.requires_grad_(True)
        self.model = backbone.model
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._recompute = gradient_checkpointing

    @property
    def temperature(self) -> Tensor:
        """The scalar divisor of similarities, kept inside MIN_TEMPERATURE..MAX_TEMPERATURE."""
        return bounded_temperature(self.log_temperature)

    def embed(self, backbone: Backbone, inputs: Prompts) -> Tensor:
        """(rows, hidden) float32 unit vectors of prompts, differentiable in what is trained."""
        # transformers recomputes in training mode only, and keeps no cache there; these models have no dropout
        self.model.train(self._recompute)
        try:
            return unit_norm(backbone.last_states(inputs).float())
        finally:
            self.model.eval()


def _inject_lora(decoder: nn.Module, rank: int, alpha: float, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    present = {name.rpartition(".")[2] for name, _ in decoder.named_modules()}
    missing = sorted(set(LORA_TARGETS) - present)
    if missing:
        raise ConfigError(
            f"LoRA needs the linear maps {', '.join(missing)}, which this language model has not; "
            "use adapter.method: slq or full"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # it is only divided by the rank
        target_modules=list(LORA_TARGETS),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, decoder)
    for parameter in decoder.parameters():
        if parameter.requires_grad:  # Adam stalls on small steps in bfloat16
            parameter.data = parameter.data.float()
