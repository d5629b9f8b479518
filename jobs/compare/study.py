"""A study: variants of one recipe that are trained and measured alike."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator, model_validator

from pipelines.loading import require_shorter
from pipelines.recipe import Recipe, StorageConfig, load_recipe
from slq.config import Section
from slq.errors import ConfigError

ZERO_SHOT = "zero-shot"
_RESERVED = ("data", ZERO_SHOT)
_SHARED = ("backbone", "data", "retention")
_OUT_DECIDES = "--out decides where a study writes"
_SAME_FOR_ALL = "all runs are measured on one model and data, which the study's own `set` names"
_Settings = dict[str, Any]


class RunConfig(Section):
    """One variant."""

    set: _Settings = Field(default_factory=dict)
    """Overrides of this run, `section.key: value`."""
    tune: dict[str, Annotated[list[Any], Field(min_length=2)]] = Field(default_factory=dict)
    """One key with the values that are tried before the run."""
    negatives_of: str | None = None
    """An earlier run whose adapter mines the hard negatives of this one, by this one's `mine` section."""
    adapter_of: str | None = None
    """An earlier run whose adapter this one measures in another way, by its own `rerank` or `eval` keys; nothing is
    trained."""

    @field_validator("tune")
    @classmethod
    def _one_key(cls, tune: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if len(tune) > 1:
            raise ValueError(f"tune one key, not {' and '.join(tune)}")
        return tune

    @model_validator(mode="after")
    def _trains_nothing_with_the_adapter_of_another(self) -> "RunConfig":
        if self.adapter_of is None:
            return self
        if self.tune or self.negatives_of is not None:
            raise ValueError(
                "adapter_of trains nothing, so tune and negatives_of have no place beside"
            )
        wrong = [key for key in self.set if key.partition(".")[0] not in ("rerank", "eval")]
        if wrong:
            raise ValueError(
                f"adapter_of measures an adapter as it is, so {wrong[0]} has no place here; set rerank and eval keys"
            )
        return self


class Study(Section):
    """What `slq compare` trains and measures."""

    recipe: Path
    """What all runs start from; relative to the study's file."""
    set: _Settings = Field(default_factory=dict)
    """Overrides of all runs, `section.key: value`."""
    retention_scenes: Annotated[int, Field(ge=0)] = 0
    """Held-out scenes on which the model's own skills are asked before and after training; 0 leaves it to
    `retention.scenes` of the recipe, which also names sets of questions."""
    tune_steps: Annotated[int, Field(gt=0)] = 40
    """Optimiser steps of each trial run."""
    baseline: str | None = None
    """The run that all others are tested against, query by query; the first one if null."""
    runs: Annotated[dict[str, RunConfig], Field(min_length=1)]
    """The variants by name, in the order of the table."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One value of the key that is tuned.

    Attributes:
        value: As the recipe understands it.
        recipe: Of the short training that judges it.
        final: Of the run, should this value be chosen.
    """

    value: Any
    recipe: Recipe
    final: Recipe


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant, resolved.

    Attributes:
        name: As in the study.
        folder: Where everything of it is written.
        recipe: Of the final training; a tuned key still has the recipe's value.
        key: What is tuned; empty if nothing is.
        trials: One for each value.
        miner: The run whose adapter mines the hard negatives; None where none are wanted.
        source: The run whose adapter is measured; None where one is trained.
    """

    name: str
    folder: Path
    recipe: Recipe
    key: str
    trials: tuple[Trial, ...]
    miner: "Run | None" = None
    source: "Run | None" = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study, resolved.

    Attributes:
        source: The study's file.
        study: As read.
        out_dir: Everything is below it.
        zero_shot: Measures the backbone without training.
        runs: In the study's order.
    """

    source: Path
    study: Study
    out_dir: Path
    zero_shot: Recipe
    runs: tuple[Run, ...]

    @property
    def num_trainings(self) -> int:
        """Trials and final trainings."""
        return sum(1 + len(run.trials) for run in self.runs if run.source is None)

    @property
    def baseline(self) -> str:
        """The name of the run that all others are tested against."""
        return self.study.baseline or self.runs[0].name


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        ConfigError: It is missing or no YAML, a key is unknown (the nearest is named), or a value is wrong.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"study {path} does not exist{hint}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `recipe:` and `runs:`, not {values!r}")
    study = Study.parse(values, source=path.name)
    assert isinstance(study, Study)
    return study


def plan_study(path: Path, out_dir: Path, overrides: list[str] | None = None) -> Plan:
    """Resolve every run of a study, so that all mistakes are found before the first training.

    Args:
        path: The study's file.
        out_dir: Gets `data/`, a folder for each run, and the tables.
        overrides: `section.key=value` for all runs; they win over the study's and the runs' own.

    Raises:
        ConfigError: A run cannot be what the study says; the run is named.
    """
    study = read_study(path)
    given = list(overrides or [])
    _refuse(f"{path.name}: set", study.set, ("storage",), _OUT_DECIDES)
    _refuse("--set", [text.partition("=")[0] for text in given], ("storage",), _OUT_DECIDES)
    resolver = _Resolver(path, study, out_dir.resolve(), given)
    if study.baseline is not None and study.baseline not in study.runs:
        raise ConfigError(
            f"{path.name}: baseline names {study.baseline!r}, which is no run; it has {', '.join(study.runs)}"
        )
    names: dict[str, str] = {}
    for name in study.runs:
        folder = slug(name)
        if not folder or folder in _RESERVED:
            raise ConfigError(f"{path.name}: run {name!r} cannot name a folder; rename it")
        if folder in names:
            raise ConfigError(
                f"{path.name}: runs {names[folder]!r} and {name!r} would both write {folder}/; rename one"
            )
        names[folder] = name
    runs: dict[str, Run] = {}
    for name, config in study.runs.items():
        runs[name] = resolver.run(name, config, runs)
    zero_shot = resolver.recipe(ZERO_SHOT, {}, {"eval.systems": ["last_token", "untrained"]})
    out = out_dir.resolve()
    return Plan(
        source=path, study=study, out_dir=out, zero_shot=zero_shot, runs=tuple(runs.values())
    )


def slug(name: str) -> str:
    """A name as a folder: lower-case letters, digits and dots, joined by hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


class _Resolver:
    """Makes the recipes of a study's runs.

    Args:
        source: The study's file.
        study: As read.
        out_dir: Everything is below it.
        given: Overrides from the command line.
    """

    def __init__(self, source: Path, study: Study, out_dir: Path, given: list[str]) -> None:
        self._source, self._study, self._out_dir, self._given = source, study, out_dir, given
        self._path = source.parent / study.recipe

    def run(self, name: str, config: RunConfig, earlier: Mapping[str, Run]) -> Run:
        """One variant with its trials."""
        where = f"{self._source.name}: run {name!r}"
        miner = _earlier(config, "negatives_of", earlier, where)
        source = _earlier(config, "adapter_of", earlier, where)
        if source is not None:
            return self._measured(name, config, source, where)
        _refuse(where, config.set, ("storage",), _OUT_DECIDES)
        _refuse(where, [*config.set, *config.tune], ("storage", *_SHARED), _SAME_FOR_ALL)
        wanted = self.recipe(name, config.set, {}).eval
        systems = [system for system in wanted.systems if system.startswith("slq")] or ["slq"]
        if "slq" not in systems or 1 not in wanted.ks:
            raise ConfigError(
                f"{where}: hit@1 of `slq` is compared; add it to eval.systems and 1 to eval.ks"
            )
        if "slq_index" in systems:
            raise ConfigError(
                f"{where}: a study builds no index that `slq_index` could ask; leave it out of eval.systems"
            )
        last: _Settings = {"eval.systems": systems}
        recipe = self.recipe(name, config.set, last, miner)
        if (recipe.train.negatives > 0) != (miner is not None):
            raise ConfigError(
                f"{where}: train.negatives is {recipe.train.negatives} and negatives_of {config.negatives_of!r}; "
                "a run has both or neither"
            )
        key, values = next(iter(config.tune.items()), ("", []))
        if key:
            _require_tunable(recipe, self._study, where)
        trials = [
            self._trial(self.recipe(name, config.set, {**last, key: value}, miner), key)
            for value in values
        ]
        if len({trial.recipe.storage.dir for trial in trials}) < len(trials):
            raise ConfigError(f"{where}: tune.{key} has the same value twice; remove one")
        folder = recipe.storage.dir
        return Run(
            name=name, folder=folder, recipe=recipe, key=key, trials=tuple(trials), miner=miner
        )

    def _measured(self, name: str, config: RunConfig, source: Run, where: str) -> Run:
        """A run that measures another one's adapter."""
        if source.source is not None:
            raise ConfigError(
                f"{where}: adapter_of names {source.name!r}, which trains nothing; name the run that it measures"
            )
        recipe = self.recipe(name, config.set, {})
        systems = recipe.eval.systems
        if not systems or set(systems) - {"slq", "slq_fine"} or 1 not in recipe.eval.ks:
            raise ConfigError(
                f"{where}: hit@1 of `slq` or `slq_fine` is compared, not {', '.join(systems)}; set eval.systems to them"
            )
        kept = {name: getattr(source.recipe, name) for name in ("adapter", "train")}
        recipe = recipe.model_copy(update=kept)
        return Run(
            name=name,
            folder=recipe.storage.dir,
            recipe=recipe,
            key="",
            trials=(),
            source=source,
        )

    def recipe(
        self, name: str, own: _Settings, last: _Settings, miner: Run | None = None
    ) -> Recipe:
        """The study's recipe with the run's own settings, and those that nobody may override."""
        first, second, third = (
            [f"{key}={json.dumps(value)}" for key, value in part.items()]  # JSON is YAML
            for part in (self._study.set, own, last)
        )
        try:
            found = load_recipe(self._path, [*first, *second, *self._given, *third])
            require_shorter(found, "eval.dimensions", found.eval.dimensions)
            require_shorter(found, "train.matryoshka", found.train.matryoshka)
        except ConfigError as error:
            raise ConfigError(f"{self._source.name}: run {name!r}: {error}") from None
        data, storage = found.data, found.storage
        chosen = any(k.startswith("data.dir") for k in (*self._study.set, *self._given))
        if data.scenes is not None and not chosen:
            data = data.model_copy(update={"dir": self._out_dir / "data"})
        if miner is not None:
            place = os.path.relpath(miner.folder / _negatives_name(found), data.dir)
            data = data.model_copy(update={"negatives": Path(place)})
        return found.model_copy(
            update={"data": data, "storage": _below(storage, self._out_dir, slug(name))}
        )

    def _trial(self, final: Recipe, key: str) -> Trial:
        value = reduce(getattr, key.split("."), final)
        steps = self._study.tune_steps
        training = {"num_steps": steps, "checkpoint_every": steps, "eval_every": steps}
        place = f"trials/{slug(str(value)) or 'none'}"
        sections = {
            "train": final.train.model_copy(update=training),
            "storage": _below(final.storage, final.storage.dir, place),
        }
        return Trial(value=value, recipe=final.model_copy(update=sections), final=final)


def _earlier(config: RunConfig, key: str, earlier: Mapping[str, Run], where: str) -> Run | None:
    """The run that a key of another one names."""
    wanted = getattr(config, key)
    if wanted is None:
        return None
    if wanted not in earlier:
        raise ConfigError(f"{where}: {key} names {wanted!r}, which is no run before this one")
    return earlier[wanted]


def _negatives_name(recipe: Recipe) -> str:
    """The file of what is mined with some settings; runs that agree share it."""
    settings = recipe.model_dump_json(include={"mine", "index", "rerank"})
    return f"negatives-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.parquet"


def _below(storage: StorageConfig, folder: Path, place: str) -> StorageConfig:
    """Storage of one run or trial; where checkpoints go elsewhere, it has a place of its own there."""
    kept = storage.checkpoints and f"{storage.checkpoints.rstrip('/')}/{place}"
    return storage.model_copy(update={"dir": folder / place, "checkpoints": kept})


def _require_tunable(recipe: Recipe, study: Study, where: str) -> None:
    if not recipe.train.held_out:
        raise ConfigError(f"{where}: trials are judged on held-out pairs; set train.held_out")
    if study.tune_steps <= recipe.train.warmup_steps:
        raise ConfigError(
            f"{where}: tune_steps is {study.tune_steps}, so a trial would not get past train.warmup_steps "
            f"({recipe.train.warmup_steps}); raise it"
        )


def _refuse(where: str, keys: Iterable[str], sections: tuple[str, ...], reason: str) -> None:
    for key in keys:
        if key.partition(".")[0] in sections:
            raise ConfigError(f"{where}: {key} has no place here: {reason}")
