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
from types import FrameType

import ray
from ray import serve
from ray.serve.context import _get_global_client

from pipelines.recipe import Recipe
from pipelines.serving.app import APP_NAME, application
from pipelines.serving.checks import pinned_to
from pipelines.serving.logs import logging_config
from pipelines.serving.pinned import Pinned
from slq.errors import ServiceError

log = logging.getLogger(__name__)
_owned: set[str] = set()  # "serve" and "application": what this process started, so may stop
_started: list[Pinned] = []


def check_before_start(recipe: Recipe) -> Pinned:
    """Refuse to start what could not answer; gives what the service will be pinned to.

    Raises:
        SlqError: As `pinned_to` raises.
        ServiceError: The port is in use, or a service on this cluster is in the way.
    """
    found = pinned_to(recipe)
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
