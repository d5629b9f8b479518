"""The model of a run."""

from pipelines.loading import reranker_of, reranking_backbone, scorer_digest, scorer_of
from pipelines.reranking.flow import Flow
from slq.errors import ArtifactMismatchError
from slq.reranker import Reranker


def reranker(flow: Flow) -> Reranker:
    """The recipe's fine stage.

    Raises:
        ArtifactMismatchError: The model is not what the run was begun with: its files changed, or a node has others.
    """
    backbone = reranking_backbone(flow.recipe)
    found = scorer_digest(scorer_of(flow.recipe, backbone))
    if found != flow.scorer:
        raise ArtifactMismatchError(
            f"the run was begun with scorer {flow.scorer[:12]}, and this worker has loaded {found[:12]}: the files of "
            f"{backbone.name} differ between nodes, or changed; use the same everywhere"
        )
    return reranker_of(flow.recipe, backbone)
