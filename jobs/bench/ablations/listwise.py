"""Candidates side by side, with the right one at every place, so that a liking for places shows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.bench.ablations.orders import Bools, pair_report, share
from jobs.bench.ablations.scores import Scorer
from jobs.bench.ablations.subject import Subject
from slq.backbones import Backbone
from slq.errors import ConfigError
from slq.reranking.listwise import NAMES, averaged, rotations
from slq.schema import Item

_CHUNK = 64
Question = tuple[Item, Sequence[Item]]  # a query, and its candidates


def option_tokens(backbone: Backbone, count: int) -> list[int]:
    """Tokens of the options' names.

    Raises:
        ConfigError: There are not as many names, or one is not a single token.
    """
    if count > len(NAMES):
        raise ConfigError(f"{count} candidates cannot stand side by side; {len(NAMES)} at most")
    ids = [backbone.token_ids(backbone.answer_lead + name) for name in NAMES[:count]]
    if any(len(one) != 1 for one in ids):
        raise ConfigError(f"the names of options are not single tokens of {backbone.name}")
    return [one[0] for one in ids]


def compared(
    scorer: Scorer,
    backbone: Backbone,
    questions: Sequence[Question],
    tell: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Log-probabilities of options, (questions, rotations, places); all questions have as many candidates.

    Args:
        scorer: Runs the passes.
        backbone: Names the options.
        questions: In rotation r candidate n stands at place (n - r) modulo their number.
        tell: Called with the number of questions that have been asked further.
    """
    count = len(questions[0][1])
    ids = option_tokens(backbone, count)
    said = torch.empty(len(questions), count, count)
    for start in range(0, len(questions), _CHUNK):
        chunk = questions[start : start + _CHUNK]
        layouts = [one for question in chunk for one in rotations(*question)]
        of_chunk = torch.empty(len(layouts), count)
        for numbers, logits in scorer.logits(layouts):
            of_chunk[numbers] = logits[:, ids].float().log_softmax(-1).cpu()
        said[start : start + len(chunk)] = of_chunk.reshape(len(chunk), count, count)
        tell(len(chunk))
    found: NDArray[np.float32] = said.numpy()
    return found


def means(said: NDArray[np.float32]) -> NDArray[np.float32]:
    """(questions, candidates) log-probabilities of candidates, averaged over places."""
    found: NDArray[np.float32] = torch.stack(
        [averaged(torch.from_numpy(one)) for one in said]
    ).numpy()
    return found


def pair_questions(subject: Subject) -> dict[str, list[Question]]:
    """What is asked of each hard pair, the right candidate first: of image 0 and 1, then of caption 0 and 1."""
    found: dict[str, list[Question]] = {"image_to_text": [], "text_to_image": []}
    for pair in subject.pairs:
        captions = [subject.queries[n] for n in pair]
        images = [subject.items[n] for n in subject.own[pair]]
        for n in (0, 1):
            found["image_to_text"].append((images[n], [captions[n], captions[1 - n]]))
            found["text_to_image"].append((captions[n], [images[n], images[1 - n]]))
    return found


def right_by_place(said: NDArray[np.float32]) -> dict[str, Bools]:
    """Whether the right one of two candidates is taken; a tie is wrong.

    Args:
        said: (questions, 2, 2) of `compared`, the right candidate first.

    Returns:
        (questions,) each, with the right one at `option_1`, at `option_2`, and `averaged` over both.
    """
    mean = means(said)
    return {
        "option_1": said[:, 0, 0] > said[:, 0, 1],
        "option_2": said[:, 1, 1] > said[:, 1, 0],
        "averaged": mean[:, 0] > mean[:, 1],
    }


def position_report(said: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """What `pair_report` tells, averaged over places, and `position`: shares by place of the right option.

    Args:
        said: (pairs * 2, 2, 2) for each direction.
    """
    right = {direction: right_by_place(of_direction) for direction, of_direction in said.items()}
    report = pair_report({name: one["averaged"].reshape(-1, 2) for name, one in right.items()})
    places = {
        direction: {name: share(values) for name, values in one.items()}
        for direction, one in right.items()
    }
    return {**report, "position": places}
