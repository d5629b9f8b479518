"""The base of all settings: frozen pydantic models that name the nearest key when one is unknown."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from slq.errors import ConfigError

SECRET = "secret"
"""Type of a validation error whose value must not be shown."""


class Section(BaseModel):
    """One frozen section of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str) -> "Section":
        """Validate `values`.

        Args:
            values: Plain data as read from YAML.
            source: Where they come from, for messages.

        Raises:
            ConfigError: A key is unknown (the nearest is named) or a value breaks its rule.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(
                "\n".join(_explain(cls, item, source) for item in error.errors())
            ) from None


def _explain(model: type[BaseModel], item: Any, source: str) -> str:
    location = tuple(part for part in item["loc"] if isinstance(part, str))
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == SECRET:
        return f"{source}: {path}: {item['msg']}"
    if item["type"] != "extra_forbidden":
        return f"{source}: {path}: {item['msg']} (got {item['input']!r})"
    known = _fields_at(model, location[:-1])
    nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    parent = ".".join(location[:-1])
    prefix = f"{parent}." if parent else ""
    hint = (
        f"did you mean {prefix}{nearest[0]}?"
        if nearest
        else f"known keys: {', '.join(sorted(known))}"
    )
    return f"{source}: {path} is unknown; {hint}"


def _fields_at(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    current: Any = model
    choices: list[type[BaseModel]] = []
    for name in path:
        if (
            name not in current.model_fields
        ):  # a key of a mapping of sections, or the tag of a union
            tagged = [choice for choice in choices if _is_tagged(choice, name)]
            current = tagged[0] if tagged else current
            continue
        choices = _models_in(current.model_fields[name].annotation)
        if not choices:
            return []
        current = choices[0]
    return list(current.model_fields)


def _is_tagged(model: type[BaseModel], tag: str) -> bool:
    field = model.model_fields.get("format")
    return field is not None and tag in get_args(field.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
