"""The shipped corpus: emoji sprites composed into captioned scenes, as many as one asks for."""

from slq.scenes.captions import explicit_caption, explicit_captions, knowledge_caption
from slq.scenes.layout import BACKGROUNDS, Entity, Scene
from slq.scenes.rendering import render, render_png
from slq.scenes.sampling import SPLITS, SceneSampler, hard_variants
from slq.scenes.sprites import CLUE_CATEGORIES, Sprite, load_sprites

__all__ = [
    "BACKGROUNDS",
    "CLUE_CATEGORIES",
    "SPLITS",
    "Entity",
    "Scene",
    "SceneSampler",
    "Sprite",
    "explicit_caption",
    "explicit_captions",
    "hard_variants",
    "knowledge_caption",
    "load_sprites",
    "render",
    "render_png",
]
