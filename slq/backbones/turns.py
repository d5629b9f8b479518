"""One user's turn of texts and any number of images, as a model's own chat template writes it."""

from collections.abc import Sequence

from PIL import Image

from slq.backbones.base import Backbone, Prompt
from slq.backbones.prompting import join_vision
from slq.errors import DataError
from slq.media import sanitise_text
from slq.schema import Item

Content = Sequence[str | Image.Image]
"""Texts and images in the order in which they are read."""


def turn_prompt(backbone: Backbone, content: Content) -> Prompt:
    """Token ids of a whole turn and the opened answer, with the images among them.

    Texts come from outside: a control token in them loses its power, and none is cut.

    Args:
        backbone: Whose template it is.
        content: Not empty. Where images do not `stand_anywhere`, one at most, and it comes first.

    Raises:
        DataError: The family cannot show the images where they stand.
    """
    ids = list(backbone.plain_ids)
    text = backbone.text_lead if isinstance(content[0], str) else ""
    seen = []
    for place, part in enumerate(content):
        if isinstance(part, str):
            text += harmless(part, backbone)
            continue
        opened = backbone.tokenised([Item(image=part)], close=False)[0]
        try:
            shown, tail = backbone.within_turn(opened.ids)
        except DataError:
            if place:
                raise
            return _after_one(backbone, opened, content[1:])
        ids += [*_tokens(backbone, text), *shown]
        text = tail
        seen.append(opened.vision)
    ids += [*_tokens(backbone, text), *backbone.closing_ids]
    return Prompt(ids, join_vision(seen))


def _after_one(backbone: Backbone, opened: Prompt, rest: Content) -> Prompt:
    """The turn of a family that shows an image at the start of it only."""
    texts = [part for part in rest if isinstance(part, str)]
    if len(texts) < len(rest):
        raise DataError(
            f"{backbone.name} shows one image at the start of a turn only; leave the others out"
        )
    text = "".join(harmless(part, backbone) for part in texts)
    return Prompt([*opened.ids, *_tokens(backbone, text), *backbone.closing_ids], opened.vision)


def stand_anywhere(backbone: Backbone) -> bool:
    """Whether the family shows any number of images anywhere in a turn, not just one at its start."""
    opened = backbone.tokenised([Item(image=Image.new("RGB", (32, 32)))], close=False)[0]
    try:
        backbone.within_turn(opened.ids)
    except DataError:
        return False
    return True


def harmless(text: str, backbone: Backbone) -> str:
    """The text without power over the turn, as `sanitise_text`, with its outer white space."""
    inner = text.strip()
    if not inner:
        return text
    start = text.index(inner)
    clean = sanitise_text(inner, backbone.special_tokens)
    return text[:start] + clean + text[start + len(inner) :]


def _tokens(backbone: Backbone, text: str) -> list[int]:
    return backbone.token_ids(text) if text else []
