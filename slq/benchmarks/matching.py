"""When what a model said is right, as the benchmarks of question answering define it."""

import math
import re

_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,]|$)")
_NUMBER_WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip
_KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d)(?![\d,])")


def says_exactly(said: str, answer: str) -> bool:
    """Whether what was said is the answer and nothing else, as RealWorldQA asks for it.

    Case, outer white space and a full stop do not count, number words up to twelve are numbers, and a letter may stand
    in front of its option, as in `B. the left one` and `(B)`.
    """
    if _is_letter(answer):
        found = _LETTER.match(said.strip())
        return found is not None and found[1].upper() == answer
    return _plain(said) == _plain(answer)


def holds_answer(said: str, answer: str) -> bool:
    """Whether the answer stands in what was said, as words or a number of its own; a letter in upper case."""
    if says_exactly(said, answer):
        return True
    text, wanted = (said, answer) if _is_letter(answer) else (said.lower(), answer.lower())
    return re.search(rf"(?<!\w)(?<!\d\.){re.escape(wanted.strip())}(?!\w|\.\d)", text) is not None


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and answer.isalpha() and answer.isupper()


def _plain(text: str) -> str:
    plain = text.strip().rstrip(".").strip().lower()
    return _NUMBER_WORDS.get(plain, plain)


def holds_text(said: str, answers: tuple[str, ...], *, is_formula: bool) -> bool:
    """Whether one of the answers stands in what was said, as OCRBench counts it.

    Args:
        said: By the model.
        answers: Right ones.
        is_formula: Of handwritten formulas (data set HME100k): white space does not count at all, and case does. Of all
            others a line break is a space, and case does not count.
    """

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    return any(plain(answer) in plain(said) for answer in answers)


def says_openly(said: str, answers: tuple[str, ...]) -> bool:
    """Whether an open question of MMMU is answered, by the rules of its publisher.

    Of each line the words count that follow the last of a few key words (`is`, `so`, `answer`, ... and in the last
    line `=`), by whichever of these leaves the fewest; where there is none, all that was said. A number is right if it
    equals an answer to two decimals, wherever it stands in these words; a text answer if it stands in them, whatever
    the case. A single letter needs a space beside it, or it is the only thing said.
    """
    wanted = [form for answer in answers for form in _forms(answer)]
    found = [form for words in _key_parts(said) for form in _forms(words)]
    found += [
        form
        for words in _key_parts(said)
        for pattern in (_WITH_COMMAS, _SCIENTIFIC, _PLAIN)
        for number in pattern.findall(words)
        for form in _forms(number)
    ]
    texts = [form for form in found if isinstance(form, str)]
    numbers = [form for form in found if isinstance(form, float)]
    return any(
        any(form in text for text in texts) if isinstance(form, str) else form in numbers
        for form in wanted
    )


def _key_parts(said: str) -> list[str]:
    whole = said.strip().strip(".").lower()
    lines = whole.split("\n")
    parts = []
    for number, line in enumerate(lines, start=1):
        words = (*_KEY_WORDS, "=") if number == len(lines) else _KEY_WORDS
        tails = [line.rsplit(word, 1)[1].strip() for word in words if word in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest.strip(":,.!?;'"):
            parts.append(shortest)
    return parts or [whole]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals; other text in lower case; a single letter with a space on either side."""
    text = text.strip()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return [round(number, 2)]
    lower = text.lower()
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
