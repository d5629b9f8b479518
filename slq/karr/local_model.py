"""A language model that transformers loads, as a rewriter or a judge; its weights are safetensors, never pickles."""

import sys
from datetime import UTC, datetime
from typing import Any

import torch

from slq.backbones.prompting import control_tokens
from slq.errors import ConfigError, HardwareError
from slq.karr.config import LocalConfig
from slq.karr.prompts import Message, prompt_hash
from slq.karr.rewriting import Completion
from slq.media import MediaLimits, sanitise_text


class LocalModel:
    """Answers chats with a causal language model.

    Args:
        config: Which one, and how it is asked.

    Raises:
        ConfigError: It cannot be loaded, or has no chat template.
        HardwareError: Its device is not there.
    """

    def __init__(self, config: LocalConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise HardwareError(
                f"karr: device {config.device!r} was asked for, but torch sees no CUDA GPU; use device: cpu"
            )
        self._config = config
        where: dict[str, Any] = {"revision": config.revision}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(config.name, **where)
            model = AutoModelForCausalLM.from_pretrained(
                config.name, dtype=getattr(torch, config.dtype), use_safetensors=True, **where
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"karr: model {config.name!r} cannot be loaded: {error}") from None
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"karr: model {config.name!r} has no chat template, so it cannot be asked; name one that was tuned to "
                "follow instructions"
            )
        self._control_tokens = control_tokens(self._tokenizer)
        self._model = model.to(config.device).eval()

    @property
    def name(self) -> str:
        """See `LanguageModel.name`."""
        return self._config.name

    def settings(self, seed: int) -> dict[str, Any]:
        """What an answer depends on beside the chat."""
        return {**self._config.model_dump(mode="json"), "seed": seed}

    @torch.no_grad()
    def complete(self, chat: list[Message], seed: int) -> Completion:
        """See `LanguageModel.complete`; greedy at temperature 0, else drawn from the seed."""
        config, tokenizer = self._config, self._tokenizer
        prompt = tokenizer.apply_chat_template(
            [{**one, "content": self._content(one["content"])} for one in chat],
            add_generation_prompt=True,
            tokenize=False,
        )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(config.device)
        length = inputs["input_ids"].shape[1]
        drawing = (
            {"do_sample": True, "temperature": config.temperature} if config.temperature else {}
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=config.max_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **(drawing or {"do_sample": False}),
            )
        text = tokenizer.decode(found[0, length:], skip_special_tokens=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Completion(text, prompt_hash(chat, self.settings(seed)), now)

    def _content(self, content: str) -> Any:
        """Text that ends no turn, in the form that the tokenizer's template takes: plain, or in parts."""
        clean = sanitise_text(
            content, self._control_tokens, MediaLimits(max_text_chars=sys.maxsize)
        )
        return [{"type": "text", "text": clean}] if self._takes_parts else clean

    @property
    def _takes_parts(self) -> bool:
        return "part['type']" in str(self._tokenizer.chat_template) or "content['type']" in str(
            self._tokenizer.chat_template
        )
