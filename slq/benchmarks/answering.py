"""A frozen backbone answers questions: a letter by the logits of the options, words by greedy generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from slq.backbones import Backbone, Prompt
from slq.backbones.turns import Content, stand_anywhere, turn_prompt
from slq.benchmarks.questions import CHOICE, LETTERS, MARKER, Question, QuestionSet
from slq.errors import ConfigError, DataError, MediaError
from slq.media import decode_image

LEADS = ("", " ")
"""What may stand before a letter that answers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        id: Of the question.
        question_type: Of the question: `multiple-choice` or `open`.
        group: Of the question.
        given: The letter or the words; empty if the logits of the letters were not finite.
        answers: The right ones.
        score: 1 if it is right, else 0.
        images_left_out: Images that the model's family could not show.
    """

    id: str
    question_type: str
    group: str
    given: str
    answers: tuple[str, ...]
    score: float
    images_left_out: int = 0


class Respondent:
    """Puts questions to a model.

    Multiple choice is read from the logits of the letters where the answer begins, so that every question is answered;
    the publishers' own scripts parse a generated text instead, and guess where they find no letter in it. Each question
    is a turn of its own, without a system message of ours and without examples.

    Args:
        backbone: The model, as it is: frozen, or changed by an adapter that was loaded into it.
        batch_size: Questions per pass.
    """

    def __init__(self, backbone: Backbone, *, batch_size: int = 8) -> None:
        self.backbone = backbone
        self._batch_size = batch_size
        self._anywhere = stand_anywhere(backbone)
        self._letters = cache(self._find_letters)

    def answer(self, questions: Sequence[Question], source: QuestionSet) -> list[Answer]:
        """Answers in the order of the questions.

        Args:
            questions: Of one benchmark.
            source: It, which words and scores them.

        Raises:
            ConfigError: The letters of a choice are no single tokens of the model.
            MediaError: An image cannot be decoded; the question is named.
        """
        found: list[Answer] = []
        for start in range(0, len(questions), self._batch_size):
            found += self._batch(questions[start : start + self._batch_size], source)
        return found

    def _batch(self, questions: Sequence[Question], source: QuestionSet) -> list[Answer]:
        contents = [
            content_of(source.asked(one), decoded(one), anywhere=self._anywhere)
            for one in questions
        ]
        prompts = [turn_prompt(self.backbone, content) for content, _ in contents]
        choices = [n for n, one in enumerate(questions) if one.kind == CHOICE]
        others = [n for n, one in enumerate(questions) if one.kind != CHOICE]
        given: dict[int, str] = {}
        if choices:
            sizes = [len(questions[n].options) for n in choices]
            given |= zip(choices, self.chosen([prompts[n] for n in choices], sizes), strict=True)
        if others:
            said = self.said([prompts[n] for n in others], source.max_new_tokens)
            given |= zip(others, said, strict=True)
        return [
            Answer(
                id=one.id,
                question_type=one.kind,
                group=one.group,
                given=given[n],
                answers=one.answers,
                score=float(source.is_right(one, given[n])),
                images_left_out=contents[n][1],
            )
            for n, one in enumerate(questions)
        ]

    @torch.no_grad()
    def chosen(self, prompts: Sequence[Prompt], sizes: Sequence[int]) -> list[str]:
        """The likeliest letter of each prompt; of equals the first; empty where logits are not finite.

        Args:
            prompts: Whole turns.
            sizes: How many options each has.
        """
        states = self.backbone.last_states(self.backbone.collate(prompts))
        letters = []
        for state, size in zip(states, sizes, strict=True):
            logits = self.letter_logits(state, size)
            best = LETTERS[int(logits.argmax())]
            letters.append(best if bool(logits.isfinite().all()) else "")
        return letters

    @torch.no_grad()
    def letter_logits(self, state: Tensor, size: int) -> Tensor:
        """(size,) logits of the first letters, float32 or wider.

        Args:
            state: (hidden,) of the last token after the final norm.
            size: How many letters.
        """
        ids = self._letters(size)
        logits = self.backbone.token_logits(state[None], [i for row in ids for i in row])
        return logits.reshape(size, -1).logsumexp(1)

    def _find_letters(self, size: int) -> list[list[int]]:
        """Tokens of the first letters: with and without a space, as far as every letter is one token then."""
        letters = LETTERS[:size]
        found = []
        for lead in LEADS:
            ids = [self.backbone.token_ids(lead + letter) for letter in letters]
            if all(len(one) == 1 for one in ids):
                found.append([one[0] for one in ids])
        if not found:
            raise ConfigError(
                f"the letters {letters[0]} to {letters[-1]} are not single tokens of {self.backbone.name}, so it "
                "cannot be asked multiple choice"
            )
        return [list(row) for row in zip(*found, strict=True)]

    def said(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """What the model says after each prompt, to the end of its turn.

        Args:
            prompts: Whole turns.
            max_new_tokens: At most.
        """
        together = self.backbone.collate(prompts, padding_side="left")
        rows = self.backbone.generate(together, max_new_tokens)
        return [
            str(self.backbone.tokenizer.decode(row, skip_special_tokens=True)).strip()
            for row in rows
        ]


def decoded(question: Question) -> dict[int, Image.Image]:
    """The images of a question.

    Raises:
        MediaError: One cannot be decoded; it is named.
    """
    found = {}
    for number, data in question.images.items():
        try:
            found[number] = decode_image(data)
        except MediaError as error:
            raise MediaError(
                error.reason, f"image {number} of question {question.id}: {error}"
            ) from None
    return found


def content_of(
    text: str, images: dict[int, Image.Image], *, anywhere: bool = True
) -> tuple[Content, int]:
    """A question as a turn: its images where its markers stand, and those without a marker first.

    Args:
        text: With markers; one that comes again says `image 1` in words.
        images: By number.
        anywhere: Whether images may stand anywhere. If not, the first one that is named stands first, all markers are
            words, and the other images are left out.

    Returns:
        The turn, and how many images were left out.

    Raises:
        DataError: A marker has no image.
    """
    named = list(dict.fromkeys(int(number) for number in MARKER.findall(text)))
    for number in named:
        if number not in images:
            raise DataError(f"the text shows <image {number}>, and there is no such image")
    unnamed = [number for number in images if number not in named]
    if not anywhere:
        shown = [*unnamed, *named][:1]
        words = MARKER.sub(r"image \1" if len(images) > 1 else "the image", text)
        return [*(images[number] for number in shown), words], len(images) - len(shown)
    content: list[str | Image.Image] = [images[number] for number in unnamed]
    waiting = set(named)
    for place, part in enumerate(MARKER.split(text)):
        if place % 2 == 0:
            content += [part] if part else []
        elif int(part) in waiting:
            waiting.remove(int(part))
            content.append(images[int(part)])
        else:
            content.append(f"image {part}")
    return content, 0
