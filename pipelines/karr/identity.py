"""What the rows of a run depend on."""

from typing import Any

from pipelines.karr.source import source_state
from pipelines.loading import reranking_backbone, scorer_digest, scorer_of
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter_config
from slq.backbones.loading import backbone_revision
from slq.karr.config import EndpointConfig, JudgeConfig, ModelConfig

_LATER = {"captions", "workers", "review", "gallery", "max_error_share", "rewriter", "judges"}
"""Settings that leave a shard's rows as they are, or that are told otherwise."""
_OF_ANSWERS = ("model", "temperature", "max_tokens", "json_mode")


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """Captions, models and settings, as plain JSON; where an endpoint is does not count.

    Raises:
        ArtifactError: An adapter is asked for and missing.
        ConfigError: A file is missing.
    """
    section = recipe.karr
    settings = section.model_dump(mode="json", exclude=_LATER)
    found = {"made_by": "slq karr", **source_state(recipe), **settings}
    found["rewriter"] = {
        **_asked(section.rewriter),
        "tries": section.rewriter.tries,
        "ask_whether_named": section.rewriter.ask_whether_named,
    }
    found["judges"] = [_asked(judge) for judge in section.judges]
    found["clue_table"] = section.rewriter.kind == "clues" or recipe.data.scenes is not None
    frozen = any(judge.kind == "frozen" for judge in section.judges)
    if frozen or section.identify.by == "fine":
        scorer = scorer_of(recipe, reranking_backbone(recipe, weights=False))
        found["scorer"] = scorer_digest(scorer)
    if section.identify.by != "off":
        found["space"] = _space(recipe)
    return found


def _space(recipe: Recipe) -> dict[str, Any]:
    """Whose vectors say what neighbours are."""
    if recipe.karr.identify.system == "slq":
        return {"fingerprint": load_adapter_config(recipe.storage.adapter).fingerprint}
    backbone = recipe.backbone
    return {
        "backbone": backbone.model_dump(mode="json"),
        "revision": backbone_revision(backbone.name, backbone.revision),
        "adapter": recipe.adapter.model_dump(mode="json"),
    }


def _asked(one: ModelConfig | JudgeConfig) -> dict[str, Any]:
    """What answers depend on."""
    kept = {"kind", "name", "with_image", "framing", "min_margin"}
    told = {name: value for name, value in one.model_dump(mode="json").items() if name in kept}
    model = getattr(one, one.kind, None)
    if isinstance(model, EndpointConfig):
        return {**told, **{name: getattr(model, name) for name in _OF_ANSWERS}}
    return (
        told
        if model is None
        else {**told, "local": model.model_dump(mode="json", exclude={"device"})}
    )
