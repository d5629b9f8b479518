"""The corpus: reproducible, disjoint splits, captions true of one scene, pixels that show it."""

import io
import itertools
import re
import time
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from slq.errors import ConfigError
from slq.scenes import (
    BACKGROUNDS,
    CLUE_CATEGORIES,
    SPLITS,
    Entity,
    Scene,
    SceneSampler,
    explicit_captions,
    hard_variants,
    knowledge_caption,
    load_sprites,
    render,
    render_png,
)
from slq.scenes.captions import explicit_caption

SPRITES = load_sprites()
SAMPLERS = {split: SceneSampler(split, 0, SPRITES) for split in SPLITS}
SCENES = {split: [sampler.scene(n) for n in range(150)] for split, sampler in SAMPLERS.items()}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def names(word: str, text: str) -> bool:
    """Whether the text holds the word (or words) as such, not inside another word."""
    return re.search(rf"(?<![a-z]){re.escape(word.lower())}(?![a-z])", text.lower()) is not None


def test_there_are_enough_sprites_and_each_is_complete() -> None:
    assert len(SPRITES) >= 150
    assert len({sprite.name for sprite in SPRITES.values()}) == len(SPRITES)
    for sprite in SPRITES.values():
        assert sprite.plural
        assert len(sprite.clues) >= 2
        assert Image.open(io.BytesIO(sprite.png)).size == (64, 64)
        assert sprite.rgba(20).shape == (20, 20, 4)


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_only_on_seed_split_and_index(split: str) -> None:
    again = SceneSampler(split, 0, dict(SPRITES))  # type: ignore[arg-type]
    assert [again.scene(n) for n in reversed(range(40))][::-1] == SCENES[split][:40]
    other_seed = SceneSampler(split, 1, SPRITES)  # type: ignore[arg-type]
    assert [other_seed.scene(n) for n in range(40)] != SCENES[split][:40]
    other_split = SCENES["test" if split != "test" else "train"][:40]
    assert other_split != SCENES[split][:40]


def test_splits_share_no_combination_of_objects_whatever_the_seeds() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for split, seed in itertools.product(SPLITS, range(3)):
        sampler = SceneSampler(split, seed, SPRITES)
        for index in range(200):
            kinds = sampler.scene(index).sprite_ids
            assert list(kinds) == sorted(kinds)
            assert seen.setdefault(kinds, split) == split


def test_held_out_objects_occur_in_unseen_and_nowhere_else() -> None:
    for split, scenes in SCENES.items():
        for scene in scenes:
            assert any(SPRITES[kind].held_out for kind in scene.sprite_ids) == (split == "unseen")
    held_out = {sprite.id for sprite in SPRITES.values() if sprite.held_out}
    assert 5 <= len(held_out) <= len(SPRITES) // 4


def test_every_object_that_is_not_held_out_occurs_in_training() -> None:
    sampler = SAMPLERS["train"]
    seen = {kind for index in range(2_500) for kind in sampler.scene(index).sprite_ids}
    assert seen == {sprite.id for sprite in SPRITES.values() if not sprite.held_out}


def test_scenes_vary_in_every_way_they_can() -> None:
    scenes = SCENES["train"]
    assert {len(scene.entities) for scene in scenes} == {1, 2, 3}
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.relation for scene in scenes} == {None, "left_of", "above"}
    assert {entity.count for scene in scenes for entity in scene.entities} == {1, 2, 3, 4}
    assert {entity.size for scene in scenes for entity in scene.entities} == {None, "small", "big"}
    for scene in scenes:
        assert len(set(scene.sprite_ids)) == len(scene.entities)
        assert (scene.relation is None) == (len(scene.entities) == 1)
        assert all(entity.size is None for entity in scene.entities if entity.count > 1)


def test_distinct_scenes_differ_and_come_in_order() -> None:
    found = list(SAMPLERS["test"].distinct(60))
    assert len({scene for _, scene in found}) == 60
    assert [index for index, _ in found] == sorted({index for index, _ in found})
    assert all(SAMPLERS["test"].scene(index) == scene for index, scene in found)


def test_far_scenes_of_an_endless_stream_are_instant() -> None:
    started = time.process_time()
    for index in (999_999, 10**9, 10**12, 10**15):
        for sampler in SAMPLERS.values():
            assert sampler.scene(index) == sampler.scene(index)
    assert time.process_time() - started < 1.0


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'dev' is unknown; choose one of train, validation, test, unseen"
    ):
        SceneSampler("dev", 0, SPRITES)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_an_explicit_caption_is_true_of_one_scene_among_its_hard_variants(split: str) -> None:
    for scene in SCENES[split]:
        family = [scene, *hard_variants(scene)]
        assert len(set(family)) == len(family)
        said_by = Counter(
            caption for one in family for caption in set(explicit_captions(one, SPRITES))
        )
        assert set(said_by.values()) == {1}
        captions = explicit_captions(scene, SPRITES)
        assert len(set(captions)) == len(captions)
        assert explicit_caption(scene, SPRITES, rng(1)) in captions


def test_an_explicit_caption_is_true_of_one_scene_among_all_scenes() -> None:
    owners: dict[str, Scene] = {}
    for scene in {scene for scenes in SCENES.values() for scene in scenes}:
        for caption in explicit_captions(scene, SPRITES):
            assert owners.setdefault(caption, scene) == scene


def test_hard_variants_keep_the_objects_and_the_background() -> None:
    for scene in SCENES["train"]:
        variants = hard_variants(scene)
        assert variants
        for variant in variants:
            assert variant != scene
            assert (variant.sprite_ids, variant.background) == (scene.sprite_ids, scene.background)


def test_an_explicit_caption_names_every_object_its_number_and_the_background() -> None:
    words = {2: "two", 3: "three", 4: "four"}
    for scene in SCENES["train"]:
        for caption in explicit_captions(scene, SPRITES):
            assert names(scene.background, caption)
            for entity in scene.entities:
                sprite = SPRITES[entity.sprite_id]
                if entity.count > 1:
                    assert f"{words[entity.count]} {sprite.plural}" in caption
                else:
                    size = f"{entity.size} " if entity.size else ""
                    assert re.search(rf"\ban? {size}{re.escape(sprite.name)}\b", caption)


def test_a_caption_and_its_inverse_relation_are_both_said() -> None:
    scene = Scene((Entity("dog"), Entity("cat", 2)), "red", "left_of")
    captions = explicit_captions(scene, SPRITES)
    assert "a dog left of two cats on a red background" in captions
    assert "two cats right of a dog on a red background" in captions
    assert not any(
        "a dog right of" in caption or "two cats left of" in caption for caption in captions
    )


def own_words(sprite_id: str) -> set[str]:
    """The name, the plural, and the single-word tags that are this object's alone.

    Tags that several objects carry are class words (animal, drink, tool); music is one that has a
    single member.
    """
    sprite = SPRITES[sprite_id]
    shared = Counter(tag for one in SPRITES.values() for tag in one.tags)
    classes = {sprite.group, "music", *(tag for tag, count in shared.items() if count > 1)}
    return {sprite.name, sprite.plural} | {
        tag for tag in sprite.tags if tag not in classes and re.fullmatch("[a-z]+", tag)
    }


def test_no_clue_names_its_own_object() -> None:
    leaks = [
        (sprite.id, word, clue.text)
        for sprite in SPRITES.values()
        for clue in sprite.clues
        for word in own_words(sprite.id)
        if names(word, clue.text)
    ]
    assert leaks == []


def test_no_knowledge_caption_names_an_object_of_its_scene() -> None:
    leaks = {
        (caption, word)
        for split, scenes in SCENES.items()
        for index, scene in enumerate(scenes)
        for caption in [knowledge_caption(scene, SPRITES, rng(index))[0]]
        for kind in scene.sprite_ids
        for word in (SPRITES[kind].name, SPRITES[kind].plural)
        if names(word, caption)
    }
    assert leaks == set()


def test_a_clue_never_names_the_object_that_stands_beside() -> None:
    """Some clues name others (a carrot is what rabbits love); such a pair may meet in one scene."""
    leaks = set()
    for first, second in itertools.permutations(SPRITES.values(), 2):
        said = [clue.text for clue in first.clues]
        words = {second.name, second.plural}
        if not any(names(word, text) for word in words for text in said):
            continue
        scene = Scene((Entity(first.id), Entity(second.id)), "red", "above")
        for seed in range(12):
            caption, _ = knowledge_caption(scene, SPRITES, rng(seed))
            leaks |= {(first.id, second.id) for word in words if names(word, caption)}
    assert leaks == set()


def test_all_six_clue_categories_occur_and_a_wanted_one_is_used() -> None:
    assert {clue.category for sprite in SPRITES.values() for clue in sprite.clues} == set(
        CLUE_CATEGORIES
    )
    drawn = Counter(
        knowledge_caption(scene, SPRITES, rng(index))[1]
        for index, scene in enumerate(SCENES["train"] + SCENES["test"])
    )
    assert set(drawn) == set(CLUE_CATEGORIES)
    for sprite in SPRITES.values():
        scene = Scene((Entity(sprite.id),), "white")
        for clue in sprite.clues:
            caption, category = knowledge_caption(scene, SPRITES, rng(3), clue.category)
            assert category == clue.category
            assert any(one.text in caption for one in sprite.clues if one.category == category)


def test_every_clue_singles_out_one_object() -> None:
    texts = Counter(clue.text for sprite in SPRITES.values() for clue in sprite.clues)
    assert max(texts.values()) == 1


def test_rendering_is_deterministic_and_png_holds_the_same_pixels() -> None:
    for scene in SCENES["train"][:20]:
        first = render(scene, SPRITES, rng(4))
        assert (first.shape, first.dtype) == ((96, 96, 3), np.uint8)
        assert np.array_equal(first, render(scene, SPRITES, rng(4)))
        decoded = np.asarray(Image.open(io.BytesIO(render_png(scene, SPRITES, rng(4)))))
        assert np.array_equal(decoded, first)
    assert not np.array_equal(
        render(SCENES["train"][0], SPRITES, rng(5)), render(SCENES["train"][0], SPRITES, rng(6))
    )


# (rows, columns) where the first, second and third kind must stand, by relation and third_first.
LOW, HIGH, ALL = slice(0, 48), slice(48, 96), slice(0, 96)
PLACES: dict[tuple[int, str, bool], list[tuple[slice, slice]]] = {
    (2, "left_of", False): [(ALL, LOW), (ALL, HIGH)],
    (2, "above", False): [(LOW, ALL), (HIGH, ALL)],
    (3, "left_of", False): [(LOW, LOW), (LOW, HIGH), (HIGH, ALL)],
    (3, "left_of", True): [(HIGH, LOW), (HIGH, HIGH), (LOW, ALL)],
    (3, "above", False): [(LOW, LOW), (HIGH, LOW), (ALL, HIGH)],
    (3, "above", True): [(LOW, HIGH), (HIGH, HIGH), (ALL, LOW)],
}
ARRANGEMENTS = sorted(PLACES, key=str)


def colour_of(sprite_id: str) -> NDArray[np.float64]:
    """Mean colour of the opaque part of a sprite, decoded here."""
    rgba = np.asarray(
        Image.open(io.BytesIO(SPRITES[sprite_id].png)).convert("RGBA"), dtype=np.float64
    )
    return np.asarray((rgba[..., :3] * rgba[..., 3:]).sum((0, 1)) / rgba[..., 3].sum())


def reddest_and_bluest() -> tuple[str, str]:
    by_red = sorted(SPRITES, key=lambda kind: float(colour_of(kind) @ np.array([1.0, -0.5, -0.5])))
    by_blue = sorted(SPRITES, key=lambda kind: float(colour_of(kind) @ np.array([-0.5, -0.5, 1.0])))
    return by_red[-1], by_blue[-1]


def foreground(pixels: NDArray[np.uint8], background: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray(np.abs(pixels.astype(int) - background.astype(int)).max(2) > 6)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(1, "big"), (1, None), (1, "small"), (2, None)], ids=str)
def test_exchanging_one_object_changes_only_its_own_cell(
    arrangement: tuple[int, str, bool], shape: tuple[int, str | None]
) -> None:
    num_kinds, relation, third_first = arrangement
    kinds, other = ["dog", "cat", "cow"][:num_kinds], "tomato" if "tomato" in SPRITES else "pig"
    for seed, position in itertools.product(range(6), range(num_kinds)):
        changed = [other if number == position else kind for number, kind in enumerate(kinds)]
        pictures = []
        for chosen in (kinds, changed):
            entities = tuple(Entity(kind, shape[0], shape[1]) for kind in chosen)  # type: ignore[arg-type]
            scene = Scene(entities, "white", relation, third_first)  # type: ignore[arg-type]
            pictures.append(render(scene, SPRITES, rng(seed)))
        differs = (pictures[0] != pictures[1]).any(2)
        inside = np.zeros((96, 96), dtype=bool)
        inside[PLACES[arrangement][position]] = True
        assert differs.any()
        assert not (differs & ~inside).any()


@pytest.mark.parametrize("relation", ["left_of", "above"])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_relation_shows_in_the_pixels(relation: str, swapped: bool) -> None:
    red, blue = reddest_and_bluest()
    pair = (blue, red) if swapped else (red, blue)
    scene = Scene((Entity(pair[0]), Entity(pair[1])), "white", relation)  # type: ignore[arg-type]
    for seed in range(10):
        pixels = render(scene, SPRITES, rng(seed))
        objects = foreground(pixels, pixels[:1, :1])
        places = PLACES[(2, relation, False)]
        means = [pixels[place][objects[place]].mean(0) for place in places]
        redness = [mean[0] - mean[2] for mean in means]
        assert (redness[0] > redness[1]) != swapped


def test_the_background_shows_around_the_objects_and_is_near_its_colour() -> None:
    for background, colour in BACKGROUNDS.items():
        pixels = render(Scene((Entity("dog", 1, "small"),), background), SPRITES, rng(2))
        flat, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        assert np.abs(flat[counts.argmax()].astype(int) - colour).max() <= 9


def test_more_and_bigger_objects_cover_more_of_the_picture() -> None:
    def covered(count: int, size: str | None) -> float:
        shares = []
        for seed in range(12):
            pixels = render(Scene((Entity("tomato", count, size),), "white"), SPRITES, rng(seed))  # type: ignore[arg-type]
            flat, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
            shares.append(float(foreground(pixels, flat[counts.argmax()]).mean()))
        return float(np.mean(shares))

    small, plain, big = (covered(1, size) for size in ("small", None, "big"))
    assert small < 0.8 * plain < 0.8 * big
    ones = [covered(count, None) for count in (1, 2, 3, 4)]
    assert ones[0] < ones[1]
