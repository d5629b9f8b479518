"""What counts as a right answer, against outcomes that were worked out by hand."""

import pytest

from slq.benchmarks.matching import holds_answer, holds_text, says_exactly, says_openly


@pytest.mark.parametrize(
    ("said", "answer", "exact", "held"),
    [
        ("B", "B", True, True),
        (" b ", "B", True, True),
        ("(B)", "B", True, True),
        ("B. the left one", "B", True, True),
        ("B) left", "B", True, True),
        ("The answer is B", "B", False, True),
        ("B is right, not A", "A", False, True),
        ("A dog", "B", False, False),
        ("A dog", "A", False, True),
        ("a dog and b", "A", False, False),
        ("Blue", "B", False, False),
        ("", "B", False, False),
        ("Yes.", "Yes", True, True),
        ("yes, it is", "Yes", False, True),
        ("yesterday", "Yes", False, False),
        ("3", "3", True, True),
        ("three", "3", True, True),
        ("Three.", "3", True, True),
        ("3 cars", "3", False, True),
        ("13", "3", False, False),
        ("0.5", "5", False, False),
        ("5.2", "5", False, False),
        ("It is 5.", "5", False, True),
        ("traffic light", "Traffic Light", True, True),
        ("a traffic light", "traffic light", False, True),
        ("C++", "C++", True, True),
    ],
)
def test_an_answer_to_a_photograph(said: str, answer: str, exact: bool, held: bool) -> None:
    assert says_exactly(said, answer) is exact
    assert holds_answer(said, answer) is held


@pytest.mark.parametrize(
    ("said", "answers", "is_formula", "right"),
    [
        ("The word is CENTRE.", ("centre",), False, True),
        ("cen tre", ("centre",), False, False),
        ("12\n34", ("12 34",), False, True),
        ("nothing", ("centre", "thin"), False, True),
        ("nothing", ("centre",), False, False),
        (r"x ^ { 2 } + y", ("x^{2}+y",), True, True),
        ("x^{2}\n+y", ("x ^ { 2 } + y",), True, True),
        ("X^{2}", ("x^{2}",), True, False),
        ("a=x^{2}+1", ("x ^ {2}",), True, True),
    ],
)
def test_text_in_an_image(said: str, answers: tuple[str, ...], is_formula: bool, right: bool) -> None:  # fmt: skip
    assert holds_text(said, answers, is_formula=is_formula) is right


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("8.33", ("8.33",), True),
        ("8.333", ("8.33",), True),
        ("8.34", ("8.33",), False),
        (
            "The total is $1,234.50.",
            ("1234.5",),
            False,
        ),  # the publisher's own rule reads 1,234 there
        ("The total is $1,234", ("1234",), True),
        ("it costs 1,234", ("1234",), True),
        ("so we get 2e3", ("2000",), True),
        ("-5", ("5",), False),
        ("x = 3 + 4 = 7", ("7",), True),
        ("x = 3 + 4 = 7", ("3",), False),  # behind the last equals sign
        ("3 + 4", ("3",), True),  # without a key word all counts
        ("Thus the answer is The Nude.", ("Nude", "Naked"), True),
        ("nud", ("Nude",), False),
        ("The answer is b", ("B",), True),
        ("The answer is banana", ("B",), False),  # a letter needs a space beside it
        ("value x", ("X",), True),
        ("first it is 4\nthen nothing else", ("4",), True),
        ("a = 4\nb is 5", ("4",), False),  # an equals sign counts in the last line only
        ("", ("4",), False),
        ("nan", ("nan",), True),
        ("inf", ("1",), False),
        ("the answer is :", ("the answer is :",), True),  # nothing but a colon is no answer
    ],
)
def test_an_open_question(said: str, answers: tuple[str, ...], right: bool) -> None:
    assert says_openly(said, answers) is right
