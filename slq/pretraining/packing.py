"""Packs independent turns into rows so that no position is spent on padding and each picture is encoded once.

An image row is `[image prefix | turn | turn | ...]`: every turn sees the prefix and itself, at the positions it would
have alone, which equals one ordinary chat per turn (tested). A text row packs independent text chats the same way.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from slq.pretraining.mixture import ImageExample, Turn
from slq.pretraining.tokenizer import IMAGE, TURN_END, TURN_START, VISION_END, VISION_START

SKILLS = ("caption", "question", "match", "restate", "clue", "cover")
_PREFIX_GROUP, _PADDING_GROUP = 0, -1
_LENGTH_STEP = 32  # oneDNN prepares a kernel for each new shape; few shapes make few preparations


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed turns; image rows come first.

    Attributes:
        input_ids: (rows, seq) int64.
        positions: (3, rows, seq) int64, M-RoPE axes time, height, width.
        groups: (rows, seq) int64: 0 the image prefix, 1.. one turn each, -1 padding.
        targets: (rows, seq) int64, the token to predict, -100 where there is none: the next one, or at a visual
            token the first token of the name of what covers it.
        skills: (rows, seq) int64 index into SKILLS at targets, -1 elsewhere.
        pixels: (image_rows, 96, 96, 3) uint8.
    """

    input_ids: Tensor
    positions: Tensor
    groups: Tensor
    targets: Tensor
    skills: Tensor
    pixels: Tensor

    def attention_mask(self) -> Tensor:
        """(rows, 1, seq, seq) bool: causal inside a group, and every turn sees its row's image prefix."""
        seq = self.groups.shape[1]
        same = self.groups[:, :, None] == self.groups[:, None, :]
        prefix = (self.groups == _PREFIX_GROUP)[:, None, :]
        causal = torch.ones(seq, seq, dtype=torch.bool).tril()
        return ((same | prefix) & causal)[:, None]


class _Row:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.groups: list[int] = []
        self.targets: list[int] = []
        self.skills: list[int] = []

    def add(self, ids: list[int], positions: list[tuple[int, int, int]], group: int) -> None:
        self.ids += ids
        self.positions += positions
        self.groups += [group] * len(ids)
        self.targets += [-100] * len(ids)
        self.skills += [-1] * len(ids)


class Packer:
    """Turns examples into `PackedBatch`es.

    Args:
        tokenizer: The tiny backbone's tokenizer.
        grid: Visual tokens along one side of the picture, after merging.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, grid: int) -> None:
        self._tokenizer = tokenizer
        self._grid = grid
        self._open = self._ids(f"{TURN_START}user\n")
        self._answer = self._ids(f"{TURN_END}\n{TURN_START}assistant\n")
        self._vision = self._ids(VISION_START), self._ids(IMAGE), self._ids(VISION_END)
        self._end = self._ids(TURN_END)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def pack(self, images: list[ImageExample], texts: list[list[Turn]]) -> PackedBatch:
        """One row per image example, then one row per list of text turns."""
        rows = [self._image_row(example) for example in images]
        rows += [self._text_row(turns) for turns in texts]
        longest = max(len(row.ids) for row in rows)
        seq = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
        pad_id = int(self._tokenizer.pad_token_id)

        def stack(name: str, fill: int) -> Tensor:
            return torch.tensor([[*getattr(r, name), *[fill] * (seq - len(r.ids))] for r in rows])

        positions = torch.tensor([[*r.positions, *[(0, 0, 0)] * (seq - len(r.ids))] for r in rows])
        pixels = (
            np.stack([example.pixels for example in images]) if images else np.zeros((0,), np.uint8)
        )
        return PackedBatch(
            input_ids=stack("ids", pad_id),
            positions=positions.permute(2, 0, 1).contiguous(),  # (rows, seq, 3) -> (3, rows, seq)
            groups=stack("groups", _PADDING_GROUP),
            targets=stack("targets", -100),
            skills=stack("skills", -1),
            pixels=torch.from_numpy(pixels),
        )

    def _image_row(self, example: ImageExample) -> _Row:
        row = _Row()
        start, image, end = self._vision
        opening = [*self._open, *start]
        row.add(opening, _text_positions(0, len(opening)), _PREFIX_GROUP)
        first = len(opening)
        grid = [(first, first + r, first + c) for r in range(self._grid) for c in range(self._grid)]
        row.add(image * len(grid), grid, _PREFIX_GROUP)
        for place, name in enumerate(example.cover, start=first):
            if name:
                row.targets[place] = self._ids(name)[0]
                row.skills[place] = SKILLS.index("cover")
        after = first + self._grid
        row.add(end, _text_positions(after, 1), _PREFIX_GROUP)
        for number, turn in enumerate(example.turns, start=1):
            self._add_turn(row, self._ids(turn.user) if turn.user else [], turn, after + 1, number)
        return row

    def _text_row(self, turns: list[Turn]) -> _Row:
        row = _Row()
        for number, turn in enumerate(turns, start=1):
            self._add_turn(row, [*self._open, *self._ids(turn.user)], turn, 0, number)
        return row

    def _add_turn(self, row: _Row, user: list[int], turn: Turn, first: int, group: int) -> None:
        answer = [*self._ids(turn.answer), *self._end]
        question = [*user, *self._answer]
        ids = question + answer[:-1]  # the end token is predicted, never read
        begin = len(row.ids) + len(question) - 1
        row.add(ids, _text_positions(first, len(ids)), group)
        row.targets[begin : begin + len(answer)] = answer
        row.skills[begin : begin + len(answer)] = [SKILLS.index(turn.skill)] * len(answer)


def _text_positions(first: int, count: int) -> list[tuple[int, int, int]]:
    return [(position, position, position) for position in range(first, first + count)]
