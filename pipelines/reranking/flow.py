"""What every stage of a run knows, and what its workers load by it. This module imports no model code."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.ledger import Ledger
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from slq.reranker import Reranker

COMMAND = "slq rerank"
MODELS = "pipelines.reranking.models"
"""Where rerankers come from."""


@dataclass(frozen=True)
class Flow:
    """One run of re-ranking, as its workers see it.

    Attributes:
        recipe: The resolved recipe.
        scorer: Digest of what scores, as the driver found it.
        models: The module whose `reranker` gives the model; a test may name another.
        journal: Handle of the run's `Journal`.
    """

    recipe: Recipe
    scorer: str
    models: str = MODELS
    journal: Any = None

    def ledger(self) -> Ledger:
        """The output's files."""
        storage = self.recipe.storage
        return Ledger(storage.reranking, storage.retry_s, command=COMMAND)

    def reranker(self) -> "Reranker":
        """The fine stage, newly loaded.

        Raises:
            ArtifactMismatchError: It is not what the run was begun with.
        """
        found: Reranker = importlib.import_module(self.models).reranker(self)
        return found
