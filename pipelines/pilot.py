"""`slq pilot`: a few texts and images, and what each zero-shot method says of every pair. It needs no Ray."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.loading import backbone_of, untrained_latents, use_processors
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter
from slq.backbones import Backbone
from slq.encoder import Encoder
from slq.errors import ConfigError, DataError, MediaError
from slq.latent_queries import LatentQueries
from slq.media import decode_image
from slq.pilot import Cosines, cosines
from slq.scenes import Entity, Scene, load_sprites, render
from slq.schema import Item

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST = 12
"""Images at most, and texts: more fit into no picture; `slq eval` is for those."""
LEVELS = ("pattern matching", "knowledge", "logic")
_SPRITES = ("cat", "dog", "owl")
_TEXTS = (
    ("a cat", "cat"),
    ("the animal that barks", "dog"),
    ("the animal said to have (2+7) lives", "cat"),
)
_SEED = 7  # of where sprites stand


@dataclass(frozen=True)
class Text:
    """One row of the pilot.

    Attributes:
        text: What is looked for.
        answers: Numbers of the images that are right; empty where nobody says.
        level: Such as `knowledge`; may be empty.
    """

    text: str
    answers: frozenset[int]
    level: str = ""


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        texts: Rows.
        names: Of the images.
        images: Columns.
    """

    texts: tuple[Text, ...]
    names: tuple[str, ...]
    images: tuple[Image.Image, ...]


def shipped_case() -> Case:
    """A cat, a dog and an owl of the shipped sprites, and a text for each level."""
    images = []
    for number, sprite in enumerate(_SPRITES):
        scene = Scene((Entity(sprite),), "white")
        drawn = render(scene, load_sprites(), np.random.default_rng([_SEED, number]))
        images.append(Image.fromarray(drawn))
    texts = [
        Text(text, frozenset({_SPRITES.index(answer)}), level)
        for (text, answer), level in zip(_TEXTS, LEVELS, strict=True)
    ]
    return Case(tuple(texts), _SPRITES, tuple(images))


def read_case(texts: Path, images: Path) -> Case:
    """A case of the user's own.

    Args:
        texts: A file with a text a line; behind it, where somebody knows, a tab and the names of the right images with
            commas between them, and another tab and a level.
        images: A folder of PNG, JPEG and WebP files.

    Raises:
        ConfigError: The file or the folder is missing, there are too few or too many, or a name is of no image.
        DataError: A file cannot be read.
    """
    if not images.is_dir():
        raise ConfigError(f"--images {images} is no folder; give one with 2 to {MOST} images")
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not 2 <= len(paths) <= MOST:
        raise ConfigError(
            f"--images {images} holds {len(paths)} images ({', '.join(SUFFIXES)}); a pilot compares 2 to {MOST}"
        )
    names = [path.stem for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--images {images}: {twice[0]!r} is the name of two files; rename one")
    return Case(_read_texts(texts, names), tuple(names), tuple(_read_image(one) for one in paths))


def _read_image(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes())
    except (OSError, MediaError) as error:
        raise DataError(f"--images: {path} cannot be read: {error}") from None


def _read_texts(path: Path, names: Sequence[str]) -> tuple[Text, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {path} cannot be read as text: {error}") from None
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    found = [_text(path, row, names) for row in rows if any(cell.strip() for cell in row)]
    if not 1 <= len(found) <= MOST:
        raise ConfigError(f"--texts {path} holds {len(found)} texts; a pilot asks 1 to {MOST}")
    return tuple(found)


def _text(path: Path, row: Sequence[str], names: Sequence[str]) -> Text:
    text, answers, level, *rest = [*(cell.strip() for cell in row), "", "", ""]
    if not text or any(rest):
        raise ConfigError(
            f"--texts {path}: a line is a text, a tab, names of right images, a tab, a level; got {list(row)}"
        )
    wanted = [name.strip() for name in answers.split(",") if name.strip()]
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"--texts {path}: {name!r} is none of the images; they are {', '.join(names)}"
            )
    return Text(text, frozenset(names.index(name) for name in wanted), level)


def pilot(
    recipe: Recipe, case: Case, *, num_seeds: int, adapter: Path | None = None
) -> dict[str, Any]:
    """Compare every text with every image by each method.

    Args:
        recipe: Names the backbone and the latent queries.
        case: Texts and images.
        num_seeds: Draws of untrained latents, from `adapter.seed` on.
        adapter: A trained one to compare with, too.

    Returns:
        `texts`, `images`, `methods` (see `slq.pilot.Cosines.to_json`), `backbone`, `num_latents` and `seeds`.

    Raises:
        ArtifactError: The adapter is missing or damaged.
        ArtifactMismatchError: It belongs to another backbone.
        ConfigError: The backbone cannot be loaded.
    """
    use_processors(recipe.eval.num_threads)
    backbone = backbone_of(recipe)
    seeds = [recipe.adapter.seed + n for n in range(num_seeds)]
    encoders = [Encoder(backbone), *(Encoder(backbone, _drawn(recipe, backbone, s)) for s in seeds)]
    texts = [Item(text=one.text) for one in case.texts]
    images = [Item(image=image) for image in case.images]
    found = cosines(encoders, texts, images)
    methods = {"last_token": Cosines(found[:1]), "untrained": Cosines(found[1:])}
    if adapter is not None:
        trained = Encoder(backbone, load_adapter(adapter, backbone))  # last: a baseline changes it
        methods["slq"] = Cosines(cosines([trained], texts, images))
    answers = [one.answers for one in case.texts]
    return {
        "backbone": {"model": backbone.name, "revision": backbone.revision},
        "num_latents": recipe.adapter.num_latents,
        "seeds": seeds,
        "adapter": None if adapter is None else str(adapter),
        "images": list(case.names),
        "texts": [
            {"text": one.text, "level": one.level, "answers": sorted(one.answers)}
            for one in case.texts
        ],
        "methods": {name: one.to_json(answers) for name, one in methods.items()},
    }


def _drawn(recipe: Recipe, backbone: Backbone, seed: int) -> LatentQueries:
    """Latents that were never trained, of one seed."""
    settings = recipe.adapter.model_copy(update={"seed": seed})
    return untrained_latents(recipe.model_copy(update={"adapter": settings}), backbone)
