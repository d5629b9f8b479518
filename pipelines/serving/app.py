"""The deployments of the service and how they hang together: ingress -> backbone and index -> partitions."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.recipe import Recipe, load_recipe
from pipelines.serving.access import keys_of
from pipelines.serving.checks import pinned_to
from pipelines.serving.config import BackboneScaling, Scaling
from pipelines.serving.index_service import IndexService
from pipelines.serving.ingress import Ingress
from pipelines.serving.load import POLICY
from pipelines.serving.logs import logging_config
from pipelines.serving.partition import PartitionService
from pipelines.serving.pinned import Pinned
from pipelines.serving.replicas import BackboneService
from slq.engines import FAISS
from slq.index.config import CPU

APP_NAME = "slq"
IMPORT_PATH = "pipelines.serving.app:build"
_PROBES = 16  # requests for health and metrics at once
_DRAIN_S = 8.0  # so that a service that is told to stop has answered and gone within ten seconds
_HEALTH = {"health_check_period_s": 1, "health_check_timeout_s": 4}
"""Ray replaces a replica after three failures in a row (2.60), so one that hangs is gone within some 15 s."""


def application(recipe: Recipe, pinned: Pinned) -> Any:
    """The Serve application graph of a recipe.

    Args:
        recipe: The resolved recipe.
        pinned: What every replica checks when it starts, now or later.
    """
    plain = recipe.model_dump(mode="json")
    if keys_of(recipe.serve) is not None:  # a machine that lacks them must not answer without
        plain["serve"]["access"]["required"] = True
    scaling, queued = recipe.serve.scaling, recipe.serve.max_queued_requests
    gpus = recipe.resources.gpus_per_worker
    on_model = {"num_cpus": 0 if gpus else 1, "num_gpus": gpus}
    partitions = _partitions(recipe, pinned)
    if recipe.serve.is_together:
        # What waits for the model waits inside, so the gate bounds it; probes find room beside.
        most = min(recipe.serve.max_in_flight, scaling.backbone.max_ongoing_requests + queued)
        plain["serve"]["max_in_flight"] = most
        options = _options(scaling.backbone, most) | {"max_ongoing_requests": most + _PROBES}
        whole = Ingress.options(**options, ray_actor_options=on_model)  # type: ignore[attr-defined]
        return whole.bind(plain, pinned, None, None, *partitions)
    backbone = BackboneService.options(  # type: ignore[attr-defined]
        **_options(scaling.backbone, queued), ray_actor_options=on_model
    ).bind(plain, pinned)
    device = recipe.index.search_device
    on_gpu = {} if device == CPU else {"num_gpus": recipe.resources.gpus_per_index_worker}
    index = IndexService.options(  # type: ignore[attr-defined]
        **_options(_of_index(recipe), queued), ray_actor_options={"num_cpus": 0, **on_gpu}
    ).bind(plain, pinned, backbone, *partitions)
    # What waits for an ingress replica waits in a proxy, so the ingress itself takes all there is and refuses.
    ingress = Ingress.options(  # type: ignore[attr-defined]
        **_options(scaling.ingress, recipe.serve.max_in_flight), ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(plain, pinned, backbone, index)


class BuildArguments(BaseModel):
    """Arguments of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    recipe: Path
    """Of the cluster's machines, all of which reach the run folder that it names."""
    overrides: list[str] = []
    """`section.key=value`, as of `--set`."""


def build(arguments: dict[str, Any]) -> Any:
    """The application graph for a Serve config (`import_path`), as `serve deploy` and KubeRay's RayService build it.

    Args:
        arguments: As of `BuildArguments`.

    Raises:
        SlqError: What is served could not answer; see `pinned_to`.
    """
    given = BuildArguments.model_validate(arguments)
    recipe = load_recipe(given.recipe, given.overrides)
    return application(recipe, pinned_to(recipe))


def serve_config(recipe: Recipe, arguments: BuildArguments) -> dict[str, Any]:
    """The Serve config of a recipe's service (`serve deploy`, or `serveConfigV2` of a RayService).

    Args:
        recipe: The resolved recipe.
        arguments: That it was read from.
    """
    logs = logging_config(recipe.serve.telemetry)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": recipe.serve.host, "port": recipe.serve.port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments.model_dump(mode="json"),
                "runtime_env": {},
                "logging_config": logs.model_dump(mode="json", exclude_unset=True),
            }
        ],
    }


def _options(scaling: Scaling, max_queued: int) -> dict[str, Any]:
    """Options that all deployments have."""
    policy = {}
    if isinstance(scaling, BackboneScaling):
        arguments = {"target_busy": scaling.target_busy}
        policy = {"policy": {"policy_function": POLICY, "policy_kwargs": arguments}}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": scaling.look_back_s,
            "metrics_interval_s": min(scaling.look_back_s, 2.0),
            **policy,
        },
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": max_queued,
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        **_HEALTH,
    }


def _of_index(recipe: Recipe) -> Scaling:
    """One replica of an engine of others: a file of Milvus Lite or a folder of Qdrant lets only one process in."""
    scaling = recipe.serve.scaling.index
    if recipe.index.engine == FAISS:
        return scaling
    return scaling.model_copy(update={"min_replicas": 1, "max_replicas": 1})


def _partitions(recipe: Recipe, pinned: Pinned) -> list[Any]:
    """One deployment each, so that the router can ask for each of them; none where the index is not shared out."""
    count = recipe.resources.index_partitions
    folder = str(recipe.storage.index.resolve())
    options = _options(recipe.serve.scaling.partition, recipe.serve.max_queued_requests)
    return [
        PartitionService.options(
            name=f"Partition{number}", **options, ray_actor_options={"num_cpus": 0}
        ).bind(folder, number, count, pinned)
        for number in range(count if count > 1 else 0)
    ]
