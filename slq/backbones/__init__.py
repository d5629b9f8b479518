"""Frozen backbones: `load_backbone` takes a hub id, a folder, or the name `tiny`."""

from slq.backbones.base import Backbone, Prompt, Prompts, PromptSettings
from slq.backbones.loading import FAMILIES, load_backbone

__all__ = ["FAMILIES", "Backbone", "Prompt", "PromptSettings", "Prompts", "load_backbone"]
