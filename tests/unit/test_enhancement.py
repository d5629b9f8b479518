"""Visual enhancement: batched, cached passes against a written-out formula in single whole passes, in float64."""

import gc
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from slq.backbones.base import Backbone, PromptSettings
from slq.enhancement import EnhancementConfig, Enhancer, doubt
from slq.errors import ConfigError
from slq.reranker import Reranker
from slq.schema import Item
from tests.families import BUILDERS, picture
from tests.naive import turn_inputs, written_out_positions

FAMILIES = ["qwen3_vl", "qwen2_5_vl", "intern_vl"]
FRAMING = "true_false"
QUESTION = "Does the caption match the image? Answer True or False."
ALPHA = 0.3


@pytest.fixture(
    scope="module",
    params=[(family, "right") for family in FAMILIES] + [("qwen3_vl", "left")],
    ids="-".join,
)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    family, side = request.param
    return BUILDERS[family](double=True, settings=PromptSettings(padding_side=side))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def look_again(
    layer: Any, x: np.ndarray, own: np.ndarray, images: list[np.ndarray], alpha: float
) -> np.ndarray:
    """`FFN'(x)` of one token, (hidden,), that sees `images`, each (num_tokens, hidden)."""
    gate = float(layer.mlp.gate_proj.weight.abs().mean())
    down = float(layer.mlp.down_proj.weight.abs().mean())
    seen = np.zeros_like(own)
    for image in images:
        size = np.abs(image).mean()
        for token in image:
            seen += silu(float(x @ (token * gate / size))) * (token * down / size)
    seen *= np.abs(own).mean() / np.abs(seen).mean()
    mixed: np.ndarray = alpha * seen + (1 - alpha) * own
    return mixed


class Whole:
    """One pair as one turn through the whole model, with the formula written into one layer.

    Args:
        backbone: The model.
        content: Of the turn.
    """

    def __init__(self, backbone: Backbone, content: list[Any]) -> None:
        self.backbone = backbone
        self.inputs = turn_inputs(backbone, content)
        ids = self.inputs["input_ids"][0].tolist()
        self.is_image = [token == backbone.image_token_id for token in ids]
        self.starts = [
            n for n, shown in enumerate(self.is_image) if shown and not (n and self.is_image[n - 1])
        ]
        vision = {k: v for k, v in self.inputs.items() if k != "input_ids"}
        with torch.no_grad():
            core: Any = backbone.core
            features = core.get_image_features(**vision, return_dict=True).pooler_output
        self.images = [image.reshape(-1, backbone.hidden_size).numpy() for image in features]

    def looking(self, positions: str) -> list[int]:
        last = len(self.is_image) - 1
        behind = range(self.starts[0], last + 1)
        return {
            "answer": [last],
            "after_image": [n for n in behind if not self.is_image[n]],
            "all": list(behind),
        }[positions]

    def logits(self, layer: int | None, positions: str = "answer", alpha: float = ALPHA) -> Tensor:
        """(vocab,) logits of the next token, with `layer` looking again."""
        layers: Any = self.backbone.decoder.layers
        with ExitStack() as stack:
            if layer is not None:
                stack.enter_context(self._changed(layers[layer], self.looking(positions), alpha))
            with torch.no_grad():
                output = self.backbone.model(
                    **self.inputs,
                    attention_mask=torch.ones_like(self.inputs["input_ids"]),
                    position_ids=written_out_positions(self.backbone, self.inputs, 0),
                    use_cache=False,
                )
        found: Tensor = output.logits[0, -1]
        return found

    @contextmanager
    def _changed(self, layer: Any, looking: list[int], alpha: float) -> Iterator[None]:
        original = layer.mlp.forward

        def forward(x: Tensor) -> Tensor:
            own = original(x).clone()
            for n in looking:
                images = [
                    i for i, start in zip(self.images, self.starts, strict=True) if start <= n
                ]
                found = look_again(layer, x[0, n].numpy(), own[0, n].numpy(), images, alpha)
                own[0, n] = torch.from_numpy(found)
            return own

        layer.mlp.forward = forward
        try:
            yield
        finally:
            del layer.mlp.forward

    def doubts(self) -> list[float]:
        """How unsure each layer is of the answer: entropy of its ten likeliest tokens over ln 10."""
        states: list[Tensor] = []
        layers: Any = self.backbone.decoder.layers
        handles = [
            layer.register_forward_hook(lambda _, __, out: states.append(out[0, -1]))
            for layer in layers
        ]
        try:
            self.logits(None)
        finally:
            for handle in handles:
                handle.remove()
        decoder: Any = self.backbone.decoder
        head: Any = self.backbone.model.get_output_embeddings()
        found = []
        for state in states:
            with torch.no_grad():
                logits = head(decoder.norm(state)).numpy()
            top = np.sort(logits)[-10:]
            p = np.exp(top - top.max()) / np.exp(top - top.max()).sum()
            found.append(float(-(p * np.log(p)).sum() / math.log(10)))
        return found


CAPTIONS = ["a small red dog", "white", "two blue cats stands left of a dog"]
SHOWN = [picture(2, 3, 1), picture(3, 2, 2)]
PAIRS = [(Item(text=c), Item(image=image)) for image in SHOWN for c in CAPTIONS]
COMPOSED = (Item(text="a dog", image=picture(2, 2, 5)), Item(image=picture(2, 3, 6)))


def wholes(backbone: Backbone) -> list[Whole]:
    """Of `PAIRS` and `COMPOSED`."""
    query, candidate = COMPOSED
    head = "Query: the image above and the text: a dog\nCandidate: "
    question = "\nDoes the candidate match the query? Answer True or False."
    found = [
        Whole(backbone, [image, f"Caption: {caption}\n{QUESTION}"])
        for image in SHOWN
        for caption in CAPTIONS
    ]
    return [*found, Whole(backbone, [query.image, head, candidate.image, question])]


def slow_margins(backbone: Backbone, logits: list[Tensor]) -> list[float]:
    tokenizer = backbone.tokenizer
    ids = {}
    for words in ("True true", "False false"):
        variants = [v for word in words.split() for v in (word, f" {word}")]
        encoded = [tokenizer.encode(v, add_special_tokens=False) for v in variants]
        ids[words] = sorted({e[0] for e in encoded if len(e) == 1})
    yes, no = ids.values()
    return [float(row[yes].logsumexp(-1) - row[no].logsumexp(-1)) for row in logits]


TEXTS = (Item(text="a dog"), Item(text="two blue cats"))


def scored(backbone: Backbone, config: EnhancementConfig, **options: Any) -> list[float]:
    """With two texts among the pairs, which nothing looks at and which are alone in a batch."""
    plain = float(Reranker(backbone, framing=FRAMING).score([TEXTS]))
    reranker = Reranker(backbone, framing=FRAMING, enhancement=config, batch_size=4, **options)
    try:
        for _ in range(2):  # the second time from what is kept, if anything is
            found: list[float] = reranker.score([*PAIRS, TEXTS, COMPOSED]).tolist()
        if config.needs_whole:
            assert reranker.counts.prefix_tokens == 0
        assert float(reranker.score([TEXTS])) == pytest.approx(plain, abs=1e-6)
    finally:
        reranker.close()
    assert found.pop(len(PAIRS)) == pytest.approx(plain, abs=1e-5)
    return found


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("positions", ["answer", "after_image", "all"])
def test_a_static_layer_looks_as_the_formula_says(
    backbone: Backbone, positions: str, kept: int
) -> None:
    config = EnhancementConfig.model_validate(
        {"mode": "static", "layer": 1, "alpha": ALPHA, "positions": positions}
    )
    pairs = wholes(backbone)
    slow = slow_margins(backbone, [whole.logits(1, positions) for whole in pairs])
    plain = slow_margins(backbone, [whole.logits(None) for whole in pairs])
    found = scored(backbone, config, vision_bytes=kept, prefix_bytes=kept)
    assert found == pytest.approx(slow, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(slow, plain, strict=True)) > 1e-3


@pytest.mark.parametrize("positions", ["answer", "after_image", "all"])
def test_the_layer_after_the_first_unsure_one_looks_row_by_row(
    backbone: Backbone, positions: str
) -> None:
    pairs = wholes(backbone)
    doubts = [whole.doubts()[:2] for whole in pairs]
    threshold = float(np.median([value for row in doubts for value in row]))
    config = EnhancementConfig.model_validate(
        {
            "mode": "dynamic", "first": 0, "last": 1, "threshold": threshold,
            "alpha": ALPHA, "positions": positions,
        }
    )  # fmt: skip
    fired = [next((n for n, u in enumerate(row) if u > threshold), None) for row in doubts]
    assert len(set(fired)) > 1  # rows differ in it
    logits = [
        whole.logits(None if layer is None else layer + 1, positions)
        for whole, layer in zip(pairs, fired, strict=True)
    ]
    assert scored(backbone, config) == pytest.approx(slow_margins(backbone, logits), abs=1e-5)


def test_what_is_off_changes_no_bit(backbone: Backbone) -> None:
    expected = scored(backbone, EnhancementConfig())
    for values in ({"mode": "off"}, {"mode": "static", "alpha": 0.0}):
        assert scored(backbone, EnhancementConfig.model_validate(values)) == expected


def test_hooks_change_no_other_pass_and_no_other_thread(backbone: Backbone) -> None:
    prompts = backbone.prompts([Item(image=picture(2, 2)), Item(text="a dog")])
    plain = backbone.prefix(prompts).last_hidden
    config = EnhancementConfig.model_validate({"mode": "static", "layer": 1, "positions": "all"})
    reranker = Reranker(backbone, framing=FRAMING, enhancement=config)
    torch.testing.assert_close(backbone.prefix(prompts).last_hidden, plain, rtol=0, atol=0)
    original, found = backbone.follow_prompts, []

    def other() -> None:
        found.append(backbone.prefix(prompts).last_hidden)

    def meanwhile(*arguments: Any) -> Tensor:
        thread = Thread(target=other)
        thread.start()
        thread.join()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "follow_prompts", meanwhile)
        reranker.score(PAIRS[:1])
    torch.testing.assert_close(found[0], plain, rtol=0, atol=0)
    del reranker
    gc.collect()
    assert not any(len(layer.mlp._forward_hooks) for layer in backbone.decoder.layers)


def test_doubt_is_the_entropy_of_ten_tokens_as_a_share() -> None:
    even, sure = torch.zeros(1, 40), torch.zeros(1, 40)
    sure[0, 3] = 50.0
    assert float(doubt(even)) == pytest.approx(1.0)
    assert float(doubt(sure)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"mode": "static", "layer": 3}, r"would change layer 3, .* has layers 0 to 2"),
        ({"mode": "dynamic", "first": 1, "last": 2}, r"would change layer 3, .* first and last"),
    ],
)
def test_layers_that_the_model_has_not_are_refused(
    backbone: Backbone, values: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        Enhancer(backbone, EnhancementConfig.model_validate(values))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"first \(9\) is behind last \(7\)"):
        EnhancementConfig(mode="dynamic", first=9, last=7)
    with pytest.raises(ValidationError, match="layer belongs to mode static, not dynamic"):
        EnhancementConfig(mode="dynamic", layer=3)
    with pytest.raises(ValidationError, match="threshold belongs to mode dynamic, not static"):
        EnhancementConfig(mode="static", threshold=0.5)
    with pytest.raises(ValidationError, match="alpha"):
        EnhancementConfig(alpha=1.5)
