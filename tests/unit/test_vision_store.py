"""Training with vision features on disk: the same prefixes and gradients, and the tower runs once per image."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slq.artifacts import vision_fingerprint
from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.vision import VisionFeatures, VisionStore
from slq.errors import ArtifactError, ArtifactMismatchError
from slq.latent_queries import LatentQueries
from slq.media import pixels_sha256
from slq.prefix import Prefix
from slq.prefix_store import PrefixStore
from slq.schema import Item
from slq.training import PrefixSource, RetrievalModule, Side
from tests.families import BUILDERS, HIDDEN, picture, qwen3_vl

LARGE = 2**30
SHARED = picture(2, 2, seed=7)
SIDES = [  # pairs of image and caption, and of items with and without images
    (Item(image=picture(3, 2)), Item(text="a red dog")),
    (Item(image=SHARED), Item(text="two blue cats on a white background")),
    (Item(image=SHARED, text="what is left of it?"), Item(text="B", image=picture(1, 3, seed=3))),
    (Item(text="a green bird"), Item(image=picture(4, 1, seed=4))),
    (Item(image=picture(2, 4, seed=5)), Item(text="nothing at all")),
]
EVERY = list(range(len(SIDES)))
NUM_IMAGES = 5
Seen = list[int]


class Reader:
    """Items in memory."""

    def __init__(self) -> None:
        self.image_keys = self.query_keys = [str(n) for n in EVERY]

    def item(self, pair: int, side: Side) -> Item:
        return SIDES[pair][side == "positive"]

    def digest(self, pair: int) -> str:
        return hashlib.sha256(str(pair).encode()).hexdigest()


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return BUILDERS[str(request.param)](double=True)


@pytest.fixture
def seen(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """How many images each run of the vision tower saw."""
    return count_tower(backbone, monkeypatch)


def count_tower(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Seen:
    counts: Seen = []
    run: Callable[..., Any] = backbone.core.get_image_features

    def counted(*arguments: Any, **options: Any) -> Any:
        output = run(*arguments, **options)
        counts.append(len(output.pooler_output))
        return output

    monkeypatch.setattr(backbone.core, "get_image_features", counted)
    return counts


def source(backbone: Backbone, store: VisionStore | None) -> PrefixSource:
    return PrefixSource(backbone, Reader(), cache_bytes=0, vision_store=store, frozen_rows=2)


def open_store(backbone: Backbone, folder: Path, max_bytes: int = LARGE) -> VisionStore:
    return VisionStore(folder, vision_fingerprint(backbone), max_bytes)


def sides(source: PrefixSource, pairs: list[int]) -> list[Prefix]:
    return [*source.queries(pairs), *source.positives(pairs)]


def require_same(ours: list[Prefix], theirs: list[Prefix]) -> None:
    """Equal at real tokens; what stands at padding is never read."""
    for first, second in zip(ours, theirs, strict=True):
        assert torch.equal(first.next_position, second.next_position)
        for a, b in zip(first.split(), second.split(), strict=True):
            pairs = zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
            for x, y in [*pairs, (a.last_hidden, b.last_hidden)]:
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def features(seed: int, tokens: int = 6, levels: int = 2) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(tokens, HIDDEN, generator=generator).bfloat16() for _ in range(levels + 1)]
    return VisionFeatures(parts[0], tuple(parts[1:]))


# ---- in training ----


def test_the_tower_runs_once_per_image_over_epochs_and_runs(
    backbone: Backbone, seen: Seen, tmp_path: Path
) -> None:
    expected = sides(source(backbone, None), EVERY)
    seen.clear()
    store = open_store(backbone, tmp_path)
    first = source(backbone, store)
    require_same(sides(first, EVERY), expected)
    # the image of two queries in one batch is looked at twice
    assert sum(seen) == NUM_IMAGES + 1
    assert len(files(tmp_path)) == NUM_IMAGES
    seen.clear()
    require_same(sides(first, EVERY), expected)  # the next epoch; no prefix is cached
    later = open_store(backbone, tmp_path)
    require_same(sides(source(backbone, later), EVERY), expected)
    assert seen == []
    assert later.hits == NUM_IMAGES + 1


def test_a_batch_may_mix_stored_and_missing_images(
    backbone: Backbone, seen: Seen, tmp_path: Path
) -> None:
    expected = sides(source(backbone, None), EVERY)
    store = open_store(backbone, tmp_path)
    ours = source(backbone, store)
    sides(ours, [1, 3])
    seen.clear()
    require_same(sides(ours, EVERY), expected)
    assert sum(seen) == NUM_IMAGES - 2


def test_what_was_stored_after_it_was_read_is_used(
    backbone: Backbone, seen: Seen, tmp_path: Path
) -> None:
    ours = source(backbone, open_store(backbone, tmp_path))
    ours.read([1, 2])  # two queries show the same image; neither is stored
    ours.queries([1])
    seen.clear()
    ours.queries([2])
    assert seen == []


def test_stored_prefixes_come_before_stored_features(
    backbone: Backbone, seen: Seen, tmp_path: Path
) -> None:
    expected = sides(source(backbone, None), EVERY)
    for _ in range(2):
        prefixes = PrefixStore(tmp_path / "prefixes", "one", LARGE)
        features = open_store(backbone, tmp_path / "features")
        ours = PrefixSource(
            backbone, Reader(), cache_bytes=0, store=prefixes, vision_store=features
        )
        seen.clear()
        require_same(sides(ours, EVERY), expected)
    assert seen == []
    assert ours.cached_share == 1
    assert features.hits == 2  # the positives with an image; no query was decoded


def test_a_damaged_file_is_computed_again(backbone: Backbone, seen: Seen, tmp_path: Path) -> None:
    expected = sides(source(backbone, None), EVERY)
    sides(source(backbone, open_store(backbone, tmp_path)), EVERY)
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = open_store(backbone, tmp_path)
    seen.clear()
    require_same(sides(source(backbone, store), EVERY), expected)
    assert store.damaged >= 1
    assert 1 <= sum(seen) <= 2
    assert len(files(tmp_path)) == NUM_IMAGES
    seen.clear()
    sides(source(backbone, open_store(backbone, tmp_path)), EVERY)
    assert seen == []


def test_too_small_a_store_is_kept_in_bounds_and_changes_nothing(
    backbone: Backbone, seen: Seen, tmp_path: Path
) -> None:
    expected = sides(source(backbone, None), EVERY)
    whole = open_store(backbone, tmp_path / "whole")
    sides(source(backbone, whole), EVERY)
    bound = whole.num_bytes // 2
    ours = source(backbone, open_store(backbone, tmp_path / "half", bound))
    for _ in range(2):
        require_same(sides(ours, EVERY), expected)
        assert 0 < sum(path.stat().st_size for path in files(tmp_path / "half")) <= bound


def gradients(ours: PrefixSource, backbone: Backbone) -> list[Tensor]:
    latents = LatentQueries(4, backbone.hidden_size, embedding_std=0.2, seed=3).double()
    module = RetrievalModule(backbone, latents)
    module(ours.queries(EVERY), ours.positives(EVERY)).backward()
    found = [parameter.grad for parameter in latents.parameters()]
    return [gradient for gradient in found if gradient is not None]


def test_gradients_are_those_without_a_store(backbone: Backbone, tmp_path: Path) -> None:
    plain = gradients(source(backbone, None), backbone)
    assert len(plain) == 2
    assert min(float(gradient.norm()) for gradient in plain) > 1e-6
    for _ in range(2):
        kept = gradients(source(backbone, open_store(backbone, tmp_path)), backbone)
        for ours, theirs in zip(kept, plain, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) <= 1e-10


# ---- what the features depend on ----


def test_another_prompt_shares_the_features_and_another_model_or_type_does_not() -> None:
    ours = vision_fingerprint(qwen3_vl())
    assert ours == vision_fingerprint(
        qwen3_vl(settings=PromptSettings(prompt="In one word:", max_text_tokens=9))
    )
    assert ours != vision_fingerprint(qwen3_vl(double=True))
    assert ours != vision_fingerprint(BUILDERS["qwen2_vl"]())
    changed = qwen3_vl()
    changed.processor.image_processor.size = {"shortest_edge": 256, "longest_edge": 4096}
    assert ours != vision_fingerprint(changed)
    revised = qwen3_vl()
    revised.revision = "another"
    assert ours != vision_fingerprint(revised)


def test_features_of_another_fingerprint_are_refused(tmp_path: Path) -> None:
    VisionStore(tmp_path, "one", LARGE)
    with pytest.raises(
        ArtifactMismatchError,
        match=r"vision features of one, this run's are two; choose another train\.vision_cache",
    ):
        VisionStore(tmp_path, "two", LARGE)


def test_prefixes_and_features_do_not_share_a_folder(tmp_path: Path) -> None:
    PrefixStore(tmp_path, "one", LARGE)
    with pytest.raises(ArtifactError, match="holds prefixes and not vision features"):
        VisionStore(tmp_path, "one", LARGE)


@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": "one"}'])
def test_a_folder_whose_description_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"cannot be opened.*choose another train\.vision"):
        VisionStore(tmp_path, "one", LARGE)


def test_the_digest_is_of_what_the_image_shows() -> None:
    image = picture(3, 2)
    assert pixels_sha256(image) == pixels_sha256(image.copy())
    other = image.copy()
    other.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))  # type: ignore[union-attr]
    turned = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    grey = Image.frombytes("L", (image.width * 3, image.height), image.tobytes())
    assert len({pixels_sha256(shown) for shown in (image, other, turned, grey)}) == 4


# ---- the store ----


@pytest.mark.parametrize("levels", [0, 3])
def test_features_come_back_bit_for_bit(tmp_path: Path, levels: int) -> None:
    VisionStore(tmp_path, "one", LARGE).put("a", features(0, levels=levels))
    found, put = VisionStore(tmp_path, "one", LARGE).get("a"), features(0, levels=levels)
    assert found is not None
    assert len(found.deepstack) == levels
    for ours, theirs in zip(
        (found.tokens, *found.deepstack), (put.tokens, *put.deepstack), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_threads_may_read_while_one_writes_and_pushes_out(tmp_path: Path) -> None:
    store = VisionStore(tmp_path, "one", LARGE)
    store.put("0", features(0))
    store = VisionStore(tmp_path, "one", 5 * store.num_bytes + 10)
    with ThreadPoolExecutor(4) as pool:
        for seed in range(1, 40):
            wanted = [str(max(0, seed - back)) for back in range(8)]
            reads = [pool.submit(store.get, key) for key in wanted]
            store.put(str(seed), features(seed))
            for key, read in zip(wanted, reads, strict=True):
                found = read.result()
                assert found is None or torch.equal(found.tokens, features(int(key)).tokens)
    assert store.damaged == 0
    assert len(files(tmp_path)) == 5
    assert store.num_bytes == sum(path.stat().st_size for path in files(tmp_path))
