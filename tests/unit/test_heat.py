"""Heat maps: read off cached passes, against the weights of eager attention in single whole passes, in float64."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slq.backbones.base import Backbone
from slq.backbones.loading import load_backbone
from slq.backbones.watching import attention_weights, current_watch, watching
from slq.enhancement import EnhancementConfig
from slq.errors import ConfigError, DataError
from slq.latent_queries import LatentQueries
from slq.reranker import Reranker
from slq.reranking.heat import HeatMap, answer_heat, latent_heat, layers_read
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, picture
from tests.naive import chat_inputs, turn_inputs, written_out_positions

FAMILIES = ["qwen3_vl", "qwen2_5_vl", "intern_vl"]
CAPTION = "a small red dog"
QUESTION = "Does the caption match the image? Answer True or False."
PAIR_QUESTION = "\nDoes the candidate match the query? Answer True or False."
TALL, WIDE = picture(2, 3, 1), picture(5, 2, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return BUILDERS[request.param](double=True)


def reader_of(backbone: Backbone, **options: Any) -> Reranker:
    return Reranker(backbone, framing="true_false", **options)


def grid_of(backbone: Backbone, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of visual tokens: of 16 pixels a side in Qwen's families, else two of the one tile's."""
    if backbone.model.config.model_type.startswith("qwen"):
        return image.height // 16, image.width // 16
    return 2, 2


class Eager:
    """Whole sequences by transformers' own attention, which forms its weights."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __enter__(self) -> "Eager":
        self._before = self.backbone.decoder.config._attn_implementation
        self.backbone.decoder.set_attn_implementation("eager")
        return self

    def __exit__(self, *_: object) -> None:
        self.backbone.decoder.set_attn_implementation(self._before)

    def weights(self, inputs: dict[str, Tensor], latents: Tensor | None = None) -> Tensor:
        """(layers, heads, seq, seq), of a prompt and of latents that follow it."""
        count = 0 if latents is None else len(latents)
        embeds = self.backbone.model.get_input_embeddings()(inputs["input_ids"])
        if latents is not None:
            embeds = torch.cat([embeds, latents[None].to(embeds.dtype)], dim=1)
        vision = {name: value for name, value in inputs.items() if name != "input_ids"}
        with torch.no_grad():
            output = self.backbone.model.model(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                position_ids=written_out_positions(self.backbone, inputs, count),
                output_attentions=True,
                use_cache=False,
                **vision,
            )
        return torch.stack(output.attentions)[:, 0]


def expected(
    backbone: Backbone, weights: Tensor, inputs: dict[str, Tensor], rows: int, number: int = 0
) -> tuple[list[float], float]:
    """Values and share of the image `number` for the last tokens, one addition after the other."""
    layers = [1]  # of three
    assert len(weights) == 3
    ids = inputs["input_ids"][0].tolist()
    runs: list[list[int]] = []
    for place, token in enumerate(ids):
        if token == backbone.image_token_id:
            if place and ids[place - 1] == token:
                runs[-1].append(place)
            else:
                runs.append([place])
    seq = weights.shape[2]
    sums = []
    for place in runs[number]:
        found = [
            float(weights[layer, head, seq - 1 - row, place])
            for layer in layers
            for head in range(weights.shape[1])
            for row in range(rows)
        ]
        sums.append(sum(found) / len(found))
    return [one / sum(sums) for one in sums], sum(sums)


def require_equal(found: HeatMap, wanted: tuple[list[float], float], grid: tuple[int, int]) -> None:
    values, share = wanted
    assert found.values.shape == grid
    assert found.values.flatten().tolist() == pytest.approx(values, abs=1e-6)
    assert float(found.values.sum()) == pytest.approx(1, abs=1e-6)
    assert found.share == pytest.approx(share, abs=1e-6)  # eager softmax is of float32
    assert 0 < share < 1
    assert max(values) > 1.1 * min(values)  # or nothing would be compared


@pytest.mark.parametrize("image", [TALL, WIDE], ids=["tall", "wide"])
def test_before_the_answer_it_is_the_attention_of_a_whole_eager_pass(
    backbone: Backbone, image: Image.Image
) -> None:
    found = answer_heat(reader_of(backbone), Item(text=CAPTION), Item(image=image))
    inputs = turn_inputs(backbone, [image, f"Caption: {CAPTION}\n{QUESTION}"])
    with Eager(backbone) as eager:
        weights = eager.weights(inputs)
    require_equal(found, expected(backbone, weights, inputs, 1), grid_of(backbone, image))
    assert found.covers_square == (backbone.model.config.model_type == "internvl")


@pytest.mark.parametrize("same", [False, True], ids=["another", "the same"])
@pytest.mark.parametrize("vision_bytes", [0, 2**24])
def test_of_two_images_it_is_the_candidates(
    backbone: Backbone, same: bool, vision_bytes: int
) -> None:
    image = TALL if same else WIDE
    reader = reader_of(backbone, vision_bytes=vision_bytes)
    query = Item(image=TALL, text="a dog")
    found = [answer_heat(reader, query, Item(image=image)) for _ in range(2)]
    head = "Query: the image above and the text: a dog\nCandidate: "
    inputs = turn_inputs(backbone, [TALL, head, image, PAIR_QUESTION])
    with Eager(backbone) as eager:
        wanted = expected(backbone, eager.weights(inputs), inputs, 1, number=1)
    for one in found:
        require_equal(one, wanted, grid_of(backbone, image))


def test_a_candidate_that_asks_a_text_of_a_composed_query_has_no_image(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="no image in which the model could look"):
        answer_heat(reader_of(backbone), Item(text="a", image=TALL), Item(text=CAPTION))
    latents = LatentQueries(3, HIDDEN, seed=1)
    with pytest.raises(DataError, match="no image in which the model could look"):
        latent_heat(backbone, latents, Item(text=CAPTION))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("text", [None, CAPTION], ids=["image", "image and text"])
def test_of_latent_queries_it_is_the_attention_of_those_that_are_read(
    backbone: Backbone, pooling: Any, text: str | None
) -> None:
    latents = LatentQueries(3, HIDDEN, init="normal", pooling=pooling, seed=1)
    item = Item(image=WIDE, text=text)
    found = latent_heat(backbone, latents, item)
    inputs = chat_inputs(backbone, item)
    with Eager(backbone) as eager:
        weights = eager.weights(inputs, latents.latents.detach())
    rows = 3 if pooling == "mean" else 1
    require_equal(found, expected(backbone, weights, inputs, rows), grid_of(backbone, WIDE))


def test_a_pass_that_is_watched_gives_what_it_gives_else(backbone: Backbone) -> None:
    reader = reader_of(backbone)
    pairs = [(Item(text=CAPTION), Item(image=TALL))]
    before = reader.score(pairs)
    with watching(1) as watch:
        assert torch.equal(reader.score(pairs), before)
        assert current_watch() is watch
    assert current_watch() is None
    assert all(float(one.sum()) == pytest.approx(1) for one in watch.layers)


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_what_an_enhancement_changes_is_watched_as_it_is_changed(positions: Any) -> None:
    """In the first layer, before the one that is read."""
    backbone = BUILDERS["qwen3_vl"](double=True)
    pair = Item(text=CAPTION), Item(image=WIDE)
    plain = answer_heat(reader_of(backbone), *pair)
    config = EnhancementConfig(mode="static", alpha=0.5, positions=positions, layer=0)
    reader = reader_of(backbone, enhancement=config)
    found = answer_heat(reader, *pair)
    reader.close()
    assert found.values.shape == plain.values.shape
    assert float((found.values - plain.values).abs().max()) > 1e-4


def test_pairs_that_run_whole_are_watched_alike() -> None:
    """The enhancement changes what follows the layer that is read, and wants one pass for all of the pair."""
    backbone = BUILDERS["qwen3_vl"](double=True)
    pair = Item(text="a dog", image=TALL), Item(image=WIDE)
    plain = answer_heat(reader_of(backbone), *pair)
    config = EnhancementConfig(mode="dynamic", positions="all", first=0, last=1, threshold=0)
    assert config.needs_whole
    reader = reader_of(backbone, enhancement=config)
    found = answer_heat(reader, *pair)
    reader.close()
    torch.testing.assert_close(found.values, plain.values)


@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm", "idefics3"])
def test_other_families_have_a_grid_too(family: str) -> None:
    backbone = BUILDERS[family](double=True)
    found = answer_heat(reader_of(backbone), Item(text=CAPTION), Item(image=WIDE))
    tokens = backbone.image_limits()["tokens"]
    assert found.values.numel() == tokens - (family == "llava_onevision")
    assert float(found.values.sum()) == pytest.approx(1, abs=1e-6)
    if family == "llava_onevision":
        backbone.model.config.vision_feature_select_strategy = "default"
        with pytest.raises(ConfigError, match="drops the first patch"):
            backbone.visual_grid({})


def test_a_trained_rerankers_order_is_followed() -> None:
    backbone = BUILDERS["qwen3_vl"](double=True)
    reader = Reranker(backbone, framing="qwen3_vl_reranker")
    found = answer_heat(reader, Item(text=CAPTION), Item(image=WIDE, text="two"))
    assert found.values.shape == grid_of(backbone, WIDE)
    both = answer_heat(reader, Item(image=TALL), Item(image=WIDE))
    assert both.values.shape == grid_of(backbone, WIDE)


def test_a_kernel_that_shows_nothing_is_named() -> None:
    backbone = load_backbone()
    backbone.decoder.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=r"loaded with the kernel eager; load it with sdpa"):
        answer_heat(Reranker(backbone), Item(text=CAPTION), Item(image=picture(6, 6)))


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, [0]), (2, [1]), (3, [1]), (6, [2, 3]), (24, list(range(8, 16))), (28, list(range(9, 19)))],
)
def test_the_middle_third_of_the_layers_is_read(depth: int, layers: list[int]) -> None:
    assert list(layers_read(depth)) == layers


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_weights_are_softmax_of_the_written_out_products(kind: str, scaling: float | None) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    seen = torch.ones(3, 5, dtype=torch.bool).tril(2).expand(2, 1, 3, 5).clone()
    if kind != "none":
        seen[1, :, :, 0] = False
    added = torch.zeros(2, 1, 3, 5).masked_fill(~seen, -torch.inf)
    mask = {"none": None, "bool": seen, "additive": added}[kind]
    found = attention_weights(query, key, mask, scaling, num_tokens=2)
    assert found.shape == (2, 4, 2, 5)
    for row in range(2):
        for head in range(4):
            for n in (1, 2):
                products = [
                    float(query[row, head, n] @ key[row, head // 2, m]) * (scaling or 8**-0.5)
                    if seen[row, 0, n, m]
                    else -torch.inf
                    for m in range(5)
                ]
                wanted = torch.tensor(products).softmax(0)
                torch.testing.assert_close(found[row, head, n - 1], wanted)
