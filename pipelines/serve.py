"""Starts and stops the online service on Ray Serve: ingress -> backbone (embeds and scores) and index (searches).

One resident copy of the frozen weights embeds queries and scores candidates. The service refuses to start when index
and adapter carry different fingerprints, which are pinned for its whole life. It moves from one index version to
another while it answers. With several partitions the index service is their router.
"""

import logging
import re
import signal
import socket
import threading
import uuid
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from pipelines.recipe import Recipe
from pipelines.serving import traces
from pipelines.serving.index_service import MAX_ONGOING, IndexService
from pipelines.serving.ingress import Ingress
from pipelines.serving.logs import logging_config
from pipelines.serving.partition import PartitionService
from pipelines.serving.pinned import Pinned
from pipelines.serving.recall import require_exact
from pipelines.serving.replicas import BackboneService
from pipelines.tasks import require_gpus
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.engines import FAISS
from slq.errors import ConfigError, ServiceError
from slq.index import VectorIndex
from slq.index.config import CPU
from slq.index.shares import num_partitions

log = logging.getLogger(__name__)
APP_NAME = "slq"
_owned: set[str] = set()  # "serve" and "application": what this process started, so may stop
_started: list[Pinned] = []
_PARTITION_HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 10}


def application(recipe: Recipe, pinned: Pinned) -> Any:
    """The Serve application graph of a recipe.

    Args:
        recipe: The resolved recipe.
        pinned: What every replica checks when it starts, now or later.
    """
    plain = recipe.model_dump(mode="json")
    gpus = recipe.resources.gpus_per_worker
    queue = {"max_queued_requests": recipe.serve.max_queued_requests}
    scaling = {
        "min_replicas": recipe.resources.serve_replicas,
        "max_replicas": max(recipe.resources.serve_max_replicas, recipe.resources.serve_replicas),
        "target_ongoing_requests": 8,
    }
    backbone = BackboneService.options(  # type: ignore[attr-defined]
        autoscaling_config=scaling,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0 if gpus else 1, "num_gpus": gpus},
        **queue,
    ).bind(plain, pinned)
    device = recipe.index.search_device
    on_gpu = {} if device == CPU else {"num_gpus": recipe.resources.gpus_per_index_worker}
    # One replica, however many backbones: a file of Milvus Lite or a folder of Qdrant lets only one process in.
    index = IndexService.options(  # type: ignore[attr-defined]
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, **on_gpu},
        **queue,
    ).bind(plain, pinned, backbone, *_partitions(recipe, pinned))
    # The ingress only waits for the others. With Serve's default of 5 no more than 5 queries could share a pass, and
    # the rest would queue in the proxy, where nothing refuses them.
    ingress = Ingress.options(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})  # type: ignore[attr-defined]
    return ingress.bind(plain, pinned, backbone, index)


def _partitions(recipe: Recipe, pinned: Pinned) -> list[Any]:
    """One deployment each, so that the router can ask for each of them; none where the index is not shared out."""
    count = recipe.resources.index_partitions
    folder = str(recipe.storage.index.resolve())
    return [
        PartitionService.options(
            name=f"Partition{number}",
            max_ongoing_requests=MAX_ONGOING,
            max_queued_requests=recipe.serve.max_queued_requests,
            ray_actor_options={"num_cpus": 0},
            **_PARTITION_HEALTH,
        ).bind(folder, number, count, pinned)
        for number in range(count if count > 1 else 0)
    ]


def check_before_start(recipe: Recipe) -> Pinned:
    """Refuse to start what could not answer; gives what the service will be pinned to.

    Raises:
        ArtifactError: Adapter or index is missing or damaged.
        ConfigError: A GPU is named for the index, whose replica gets one from Ray; traces are asked for and cannot be
            made; or recall is, and the index's engine has no exact search.
        HardwareError: A GPU is asked for the index, and the cluster has none.
        ArtifactMismatchError: They belong to different embedding spaces; both fingerprints are named.
        ServiceError: The port is in use, or a service on this cluster is in the way.
    """
    _require_engine(recipe)
    _require_search_device(recipe)
    if recipe.serve.telemetry.traces is not None:
        traces.require_installed()
    adapter = load_adapter_config(recipe.storage.adapter)
    course_file = recipe.storage.dir.resolve() / "serve" / f"{uuid.uuid4().hex[:12]}.json"
    # Closed again: what only one process can open is the replica's.
    with recipe.index_place.open(has_codes=False) as index:
        if isinstance(index, VectorIndex):
            _warn_of_empty_partitions(recipe, index)
        elif recipe.serve.telemetry.recall_share:
            require_exact(index)  # an index of faiss always can, at the price of reading all of it
        found = Pinned(index.fingerprint, index.version, course_file)
    require_same_fingerprint(
        found.fingerprint,
        adapter.fingerprint,
        expected_in=f"index {recipe.index_place}",
        found_in=f"adapter {recipe.storage.adapter}",
        remedy="rebuild it with `slq embed` and `slq index`",
    )
    host, port = recipe.serve.host, recipe.serve.port
    running = running_endpoint()
    if running is None:
        require_free_port(host, port)
    elif running != (host, port):
        raise ServiceError(
            f"Ray Serve already listens on {running[0]}:{running[1]} of this cluster, so it cannot listen on "
            f"{host}:{port}; set serve.host and serve.port to its own, or stop it with `serve shutdown`"
        )
    elif APP_NAME in serve.status().applications:
        raise ServiceError(
            f"an application {APP_NAME!r} already runs on this cluster at {host}:{port}; stop it first"
        )
    return found


def _require_engine(recipe: Recipe) -> None:
    """Partitions and versions are those of an index of faiss."""
    if recipe.index.engine == FAISS:
        return
    for key, is_set in {
        "resources.index_partitions": recipe.resources.index_partitions > 1,
        "serve.follow_index": recipe.serve.follow_index,
    }.items():
        if is_set:
            raise ConfigError(
                f"{key} is for an index of faiss, and index.engine is {recipe.index.engine}, which has its own; leave "
                "it out"
            )


def _require_search_device(recipe: Recipe) -> None:
    device = recipe.index.search_device
    if device not in (CPU, "cuda"):
        raise ConfigError(
            f"index.search_device is {device}, but the service's index works on the GPU that Ray gives it; set "
            "index.search_device=cuda"
        )
    if device != CPU:
        gpus, way_out = recipe.resources.gpus_per_index_worker, "set index.search_device=cpu"
        require_gpus("resources.gpus_per_index_worker", gpus, way_out)
        if recipe.resources.index_partitions > 1:
            raise ConfigError(
                "a GPU holds a whole index: with index.search_device=cuda set resources.index_partitions=1"
            )


def _warn_of_empty_partitions(recipe: Recipe, index: VectorIndex) -> None:
    count, files = recipe.resources.index_partitions, num_partitions(index.manifest)
    if files < count:
        log.warning(
            "index version %s has its codes in %d files, so that %d of %d partitions hold nothing; lower "
            "resources.index_partitions, or build it with a smaller index.partition_bytes",
            *(index.version, files, count - files, count),
        )


def running_endpoint() -> tuple[str, int] | None:
    """(host, port) of the Ray Serve that already runs on the connected cluster, or None."""
    if not ray.is_initialized():
        return None
    # Ray 2.60 has no public way to read a running Serve's HTTP options; it only warns that ours are ignored.
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def require_free_port(host: str, port: int) -> None:
    """Check that the service can listen.

    Raises:
        ServiceError: Something else already does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it or choose another serve.port"
            ) from None


def start(recipe: Recipe) -> str:
    """Start the service in the connected Ray and wait until it answers; gives its URL.

    Raises:
        SlqError: As `check_before_start` raises.
        ServiceError: A replica refused to start; its reason is passed on. Nothing of the service stays behind.
    """
    pinned = check_before_start(recipe)
    joined = running_endpoint() is not None
    try:
        if not joined:
            _owned.add("serve")
            serve.start(http_options={"host": recipe.serve.host, "port": recipe.serve.port})
        _owned.add("application")
        _started.append(pinned)
        serve.run(
            application(recipe, pinned),
            name=APP_NAME,
            route_prefix="/",
            logging_config=logging_config(recipe.serve.telemetry),
        )
    except (RuntimeError, TimeoutError) as error:  # what Serve raises when a deployment fails
        reason = cause_in("\n".join([str(error), *_reports()]))
        stop()
        raise ServiceError(f"the service cannot start: {reason}") from None
    except BaseException:  # an interrupt too leaves nothing behind
        stop()
        raise
    url = f"http://{recipe.serve.host}:{recipe.serve.port}"
    log.info("serving %s (%s %s, docs at /docs)", url, recipe.index_place, pinned.index_version)
    return url


def _reports() -> list[str]:
    """What Serve says of our deployments; a replica's traceback stands here and not in the error that it raises."""
    application = serve.status().applications.get(APP_NAME)
    deployments = [] if application is None else application.deployments.values()
    return [d.message for d in deployments if d.status in ("DEPLOY_FAILED", "UNHEALTHY")]


def cause_in(report: str) -> str:
    """The message of the last exception in a report of Serve, which holds a remote traceback as text."""
    found = list(re.finditer(r"^(?:\w+\.)*(\w+): (?=\S)", report, flags=re.MULTILINE))
    if not found:
        return report.strip()
    last = found[-1]
    message = report[last.end() :].strip()
    ours = last.group().startswith("slq.errors.")
    return message if ours else f"{last.group(1)}: {message}"


def stop() -> None:
    """Drain and stop what this process started: our application, and Serve only if it was not there before."""
    if "application" in _owned and APP_NAME in serve.status().applications:
        serve.delete(APP_NAME)
    if "serve" in _owned:
        serve.shutdown()
    for pinned in _started:
        pinned.record().remove()
    _started.clear()
    _owned.clear()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def serve_until_stopped(recipe: Recipe) -> None:
    """Start the service and keep it until SIGINT or SIGTERM, during the start too, then drain it.

    A second signal is not caught: it cuts the draining short.
    """
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _interrupt) for number in wanted}
    try:
        start(recipe)
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("stopping the service")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop()
