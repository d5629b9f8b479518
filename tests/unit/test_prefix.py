"""The frozen prefix equals the naive full pass, values and gradients, in any family or padding."""

import pytest
import torch
from torch import Tensor

from slq.backbones.base import Backbone, PromptSettings
from slq.latent_queries import LatentQueries
from slq.prefix import Prefix, PrefixCache
from slq.schema import Item
from tests.families import BUILDERS, HIDDEN, picture
from tests.naive import chat_inputs, is_intern, naive_embedding, naive_hidden, written_out_positions

NUM_LATENTS = 5
MIXED = [
    Item(text="a red dog"),
    Item(image=picture(3, 2)),
    Item(text="two blue cats on a white background", image=picture(2, 4, seed=1)),
    Item(text="B"),
]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(family: str, padding_side: str = "right") -> Backbone:
    return BUILDERS[family](double=True, settings=PromptSettings(padding_side=padding_side))


def latent_queries() -> LatentQueries:
    return LatentQueries(NUM_LATENTS, HIDDEN, init="embedding", embedding_std=0.2, seed=3).double()


def gradient_of(vectors: Tensor, latents: LatentQueries) -> Tensor:
    weights = torch.linspace(-1.0, 1.0, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    (gradient,) = torch.autograd.grad((vectors * weights).sum(), latents.latents)
    return gradient


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    "items",
    [MIXED[:1], MIXED[1:2], MIXED[2:3], MIXED],
    ids=["text", "image", "image+text", "mixed"],
)
def test_prefix_and_latent_pass_equal_the_naive_full_pass_in_values_and_gradients(
    family: str, padding_side: str, items: list[Item]
) -> None:
    backbone, latents = build(family, padding_side), latent_queries()
    fast = latents.embed(backbone, backbone.prefix(backbone.prompts(items)))
    slow = torch.stack([naive_embedding(backbone, item, latents.latents) for item in items])
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    gradient = gradient_of(fast, latents)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, gradient_of(slow, latents), rtol=0, atol=1e-10)


def test_texts_may_have_latents_of_their_own(family: str) -> None:
    backbone = build(family)
    latents = LatentQueries(
        NUM_LATENTS, HIDDEN, init="embedding", embedding_std=0.2, sets="separate", seed=3
    ).double()
    assert latents.text_latents is not None
    assert torch.equal(latents.latents, latents.text_latents)
    with torch.no_grad():
        latents.text_latents.copy_(latents.text_latents.flip(0))
    fast = latents.embed(backbone, backbone.prefix(backbone.prompts(MIXED)))
    slow = [
        naive_embedding(
            backbone, item, latents.text_latents if item.image is None else latents.latents
        )
        for item in MIXED
    ]
    torch.testing.assert_close(fast, torch.stack(slow), rtol=0, atol=1e-10)
    chosen = [0, 3]  # texts alone, which move nothing but their own set
    gradients = torch.autograd.grad(fast[chosen].sum(), [latents.latents, latents.text_latents])
    assert gradients[0].abs().max() == 0 < gradients[1].abs().max()


def test_every_kind_of_input_moves_the_embedding(family: str) -> None:
    backbone, latents = build(family), latent_queries()
    items = [*MIXED, Item(image=picture(3, 2, seed=9)), Item(text="a red cat")]
    vectors = latents.embed_items(backbone, items)
    distances = torch.cdist(vectors, vectors) + torch.eye(len(items)) * 9
    assert distances.min() > 1e-3


def test_an_item_has_the_same_embedding_alone_and_in_a_batch(family: str) -> None:
    backbone, latents = build(family), latent_queries()
    together = latents.embed_items(backbone, MIXED)
    alone = torch.cat([latents.embed_items(backbone, [item]) for item in MIXED])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_the_prefix_carries_no_gradient_and_survives_the_passes_that_follow(family: str) -> None:
    backbone, latents = build(family), latent_queries()
    prefix = backbone.prefix(backbone.prompts(MIXED))
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    first = latents.embed(backbone, prefix)
    second = latents.embed(backbone, prefix)
    after = (*prefix.keys, *prefix.values)
    assert not any(tensor.requires_grad for tensor in after)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(first, second)


def test_one_pass_does_not_shift_the_positions_of_the_next(family: str) -> None:
    backbone, latents = build(family), latent_queries()
    fresh = latents.embed_items(backbone, [Item(text="a red dog")])
    latents.embed_items(backbone, [Item(image=picture(4, 2))])
    torch.testing.assert_close(latents.embed_items(backbone, [Item(text="a red dog")]), fresh)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_last_hidden_state_is_that_of_the_last_real_token(
    family: str, padding_side: str
) -> None:
    backbone = build(family, padding_side)
    nothing = torch.zeros(0, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        slow = torch.stack([naive_hidden(backbone, item, nothing)[-1] for item in MIXED])
    fast = backbone.prefix(backbone.prompts(MIXED)).last_hidden
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen2_vl"])
def test_after_a_two_by_three_image_the_latents_start_three_positions_on_not_six(
    name: str, padding_side: str
) -> None:
    backbone = build(name, padding_side)
    items = [Item(image=picture(3, 2)), Item(text="a red dog on a white background")]
    prompts = backbone.prompts(items)
    prefix = backbone.prefix(prompts)
    num_tokens = prompts.mask.sum(1)
    assert int((prompts.input_ids[0] == backbone.image_token_id).sum()) == 6
    assert prefix.next_position.tolist() == [int(num_tokens[0]) - 6 + 3, int(num_tokens[1])]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen2_vl"])
def test_latents_at_the_cache_length_would_give_another_embedding(name: str) -> None:
    backbone, latents, item = build(name), latent_queries(), Item(image=picture(3, 2))
    inputs = chat_inputs(backbone, item)
    positions = written_out_positions(backbone, inputs, NUM_LATENTS)
    trapped = positions.clone()
    trapped[..., -NUM_LATENTS:] += 3  # 6 tokens counted where 3 positions were taken
    right = naive_hidden(backbone, item, latents.latents, positions)[-NUM_LATENTS:].mean(0)
    wrong = naive_hidden(backbone, item, latents.latents, trapped)[-NUM_LATENTS:].mean(0)
    ours = backbone.follow(backbone.prefix(backbone.prompts([item])), latents.latents[None])[
        0
    ].mean(0)
    assert (right - wrong).norm() > 1e-2 * right.norm()
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["intern_vl", "llava_onevision", "smolvlm", "idefics3"])
def test_without_mrope_every_token_counts_as_one_position(name: str) -> None:
    backbone = build(name, "left")
    prompts = backbone.prompts(MIXED)
    assert torch.equal(backbone.prefix(prompts).next_position, prompts.mask.sum(1))


def test_internvl_pads_an_image_to_a_square_so_the_number_of_tokens_is_fixed() -> None:
    backbone = build("intern_vl")
    assert is_intern(backbone)
    prompts = backbone.prompts([Item(image=picture(6, 1)), Item(image=picture(1, 3))])
    assert (prompts.input_ids == backbone.image_token_id).sum(1).tolist() == [4, 4]
    assert tuple(prompts.vision["pixel_values"].shape) == (2, 3, 32, 32)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_splitting_and_stacking_keeps_every_row(family: str, padding_side: str) -> None:
    backbone, latents = build(family, padding_side), latent_queries()
    prefix = backbone.prefix(backbone.prompts(MIXED))
    rows = prefix.split()
    assert [len(row) for row in rows] == [1] * len(MIXED)
    assert [row.mask.shape[1] for row in rows] == prefix.mask.sum(1).tolist()
    assert all(bool(row.mask.all()) for row in rows)
    stacked = Prefix.stack(rows)
    assert torch.equal(stacked.next_position, prefix.next_position)
    assert torch.equal(stacked.last_hidden, prefix.last_hidden)
    for ours, theirs in zip(
        (*stacked.keys, *stacked.values), (*prefix.keys, *prefix.values), strict=True
    ):
        for number in range(len(MIXED)):
            assert torch.equal(
                ours[number][:, stacked.mask[number]], theirs[number][:, prefix.mask[number]]
            )
    torch.testing.assert_close(
        latents.embed(backbone, stacked), latents.embed(backbone, prefix), rtol=0, atol=1e-10
    )


def test_a_split_row_keeps_nothing_of_the_batch_alive() -> None:
    row = make_rows(3, 7).split()[1]
    assert row.keys[0].untyped_storage().nbytes() == row.keys[0].nbytes
    assert row.num_bytes == sum(tensor.nbytes for tensor in (*row.keys, *row.values))


def test_select_repeats_and_reorders_rows() -> None:
    prefix = make_rows(3, 4)
    chosen = prefix.select(torch.tensor([2, 0, 2]))
    assert chosen.next_position.tolist() == [102, 100, 102]
    assert torch.equal(chosen.keys[1], prefix.keys[1][[2, 0, 2]])


def make_rows(batch: int, seq: int, first: int = 100) -> Prefix:
    """Prefixes of 2 layers whose row n holds the number `first + n` everywhere."""
    marks = torch.arange(first, first + batch, dtype=torch.float64)
    block = marks[:, None, None, None].expand(batch, 1, seq, 4).clone()
    return Prefix(
        keys=(block, block + 0.25),
        values=(block + 0.5, block + 0.75),
        mask=torch.ones(batch, seq, dtype=torch.bool),
        next_position=marks.long(),
        last_hidden=marks[:, None].clone(),
        shows_image=marks % 2 == 0,
    )


class Source:
    """Computes rows by name and remembers what it was asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.asked: list[str] = []

    def __call__(self, numbers: list[int]) -> Prefix:
        wanted = [self.names[number] for number in numbers]
        self.asked += wanted
        return Prefix.stack([make_rows(1, 3, first=ord(name)) for name in wanted])


ROW_BYTES = make_rows(1, 3).num_bytes


def get(cache: PrefixCache, names: str) -> tuple[list[str], list[str]]:
    """(rows that came back, rows that had to be computed)."""
    source = Source(list(names))
    found = cache.get(list(names), source)
    return [chr(int(mark)) for mark in found.next_position], source.asked


def test_the_cache_computes_only_what_it_lacks_and_answers_in_order() -> None:
    cache = PrefixCache(100 * ROW_BYTES)
    assert get(cache, "ab") == (["a", "b"], ["a", "b"])
    assert get(cache, "cbab") == (["c", "b", "a", "b"], ["c"])
    assert (cache.hits, cache.misses) == (3, 3)


def test_a_key_that_occurs_twice_is_computed_once() -> None:
    cache = PrefixCache(100 * ROW_BYTES)
    returned, asked = get(cache, "abab")
    assert returned == ["a", "b", "a", "b"]
    assert sorted(asked) == ["a", "b"]


def test_the_least_recently_used_row_leaves_first() -> None:
    cache = PrefixCache(3 * ROW_BYTES)
    get(cache, "abc")
    get(cache, "a")
    get(cache, "d")  # pushes out b, not a
    assert get(cache, "acd") == (["a", "c", "d"], [])
    assert get(cache, "b")[1] == ["b"]


def test_the_cache_never_holds_more_than_its_bytes() -> None:
    cache = PrefixCache(2 * ROW_BYTES + 1)
    for names in ("abc", "bd", "eeee", "abcdef"):
        returned, _ = get(cache, names)
        assert returned == list(names)
        held = sum(row.num_bytes for row in cache._rows._values.values())
        assert held <= 2 * ROW_BYTES + 1
        assert held == cache._rows.num_bytes


def test_a_row_that_is_too_large_pushes_out_no_other() -> None:
    cache = PrefixCache(2 * ROW_BYTES)
    get(cache, "ab")
    large = make_rows(1, 9)
    assert large.num_bytes > 2 * ROW_BYTES
    cache.get(["large"], lambda _: large)
    assert get(cache, "ab") == (["a", "b"], [])


def test_a_cache_of_no_bytes_keeps_nothing_and_still_answers() -> None:
    cache = PrefixCache(0)
    assert get(cache, "ab") == (["a", "b"], ["a", "b"])
    assert get(cache, "ba") == (["b", "a"], ["b", "a"])
    assert (cache.hits, cache.misses) == (0, 4)


def test_cached_rows_of_a_real_backbone_give_the_same_embeddings(family: str) -> None:
    backbone, latents = build(family), latent_queries()
    cache = PrefixCache(2**24)

    def compute(numbers: list[int]) -> Prefix:
        return backbone.prefix(backbone.prompts([MIXED[number] for number in numbers]))

    cache.get(["0", "1"], compute)
    cached = cache.get(["0", "1", "2", "3"], compute)
    torch.testing.assert_close(
        latents.embed(backbone, cached), latents.embed_items(backbone, MIXED), rtol=0, atol=1e-10
    )
