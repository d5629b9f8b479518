"""Settings refuse what they do not know, and say what was probably meant and where it stands."""

from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from slq.config import Section
from slq.errors import ConfigError


class Optim(Section):
    """Optimiser settings."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: float = 0.0


class Stage(Section):
    """One of several stages."""

    framing: str = "mcq"


class Recipe(Section):
    """A whole recipe."""

    seed: int = 0
    optim: Optim = Optim()
    fallback: Optim | None = None
    stages: list[Stage] = Field(default_factory=list)
    named: dict[str, Stage] = Field(default_factory=dict)
    more: list[Stage] | None = None


def message(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        Recipe.parse(values, source="tiny.yaml")
    return str(caught.value)


def test_good_values_become_a_frozen_section() -> None:
    recipe = Recipe.parse({"seed": 3, "optim": {"lr": 0.5}}, source="tiny.yaml")
    assert isinstance(recipe, Recipe)
    assert (recipe.seed, recipe.optim.lr, recipe.optim.weight_decay) == (3, 0.5, 0.0)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 4


def test_an_unknown_key_names_its_source_and_the_nearest_key() -> None:
    assert message({"sede": 1}) == "tiny.yaml: sede is unknown; did you mean seed?"


def test_an_unknown_nested_key_names_the_whole_path() -> None:
    assert (
        message({"optim": {"lrr": 1}}) == "tiny.yaml: optim.lrr is unknown; did you mean optim.lr?"
    )


def test_an_unknown_key_of_an_optional_section_names_the_nearest_key() -> None:
    assert message({"fallback": {"weight_decoy": 1}}) == (
        "tiny.yaml: fallback.weight_decoy is unknown; did you mean fallback.weight_decay?"
    )


def test_an_unknown_key_near_nothing_lists_the_known_ones() -> None:
    assert message({"optim": {"zzz": 1}}) == (
        "tiny.yaml: optim.zzz is unknown; known keys: lr, weight_decay"
    )


def test_an_unknown_key_in_a_list_of_sections_names_its_place() -> None:
    text = message({"stages": [{"framing": "mcq"}, {"framin": "mcq"}]})
    assert text.startswith("tiny.yaml: stages.1.framin is unknown; did you mean ")
    assert text.endswith("framing?")


def test_an_unknown_key_in_a_mapping_of_sections_is_a_config_error_too() -> None:
    text = message({"named": {"fine": {"framin": "mcq"}}})
    assert text.startswith("tiny.yaml: named.fine.framin is unknown; did you mean ")
    assert text.endswith("framing?")


def test_an_unknown_key_in_an_optional_list_of_sections_names_the_nearest_key() -> None:
    assert message({"more": [{"framin": "mcq"}]}).endswith("framing?")


def test_a_bad_value_names_the_rule_and_the_value() -> None:
    text = message({"optim": {"lr": -1}})
    assert text.startswith("tiny.yaml: optim.lr: ")
    assert "greater than 0" in text
    assert "(got -1)" in text


def test_every_mistake_is_reported_at_once() -> None:
    lines = message({"sede": 1, "seed": "x", "optim": {"lrr": 1}}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("tiny.yaml: ") for line in lines)


def test_an_empty_file_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"tiny\.yaml"):
        Recipe.parse(None, source="tiny.yaml")  # type: ignore[arg-type]
