"""Settings of the online service, the section `serve` of a recipe."""

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from slq.config import SECRET, Section


class AccessConfig(Section):
    """Who may ask, and how much."""


class LinksConfig(Section):
    """Whether images may be named by URL."""


class TelemetryConfig(Section):
    """What the service tells of itself; `GET /metrics` is always there."""

    logs: Literal["json", "text"] = "json"
    """Form of log lines, in Ray Serve's log files and on standard error of each replica."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level of log lines; of DEBUG are those of requests for health and metrics."""
    access_log: bool = True
    """A line for each request when it ends."""
    recall_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of coarse searches that are compared with an exact one behind the answers; each reads the whole index."""
    recall_k: Annotated[int, Field(gt=0)] = 10
    """Results that are compared; searches for fewer are left out."""
    traces: str | None = None
    """URL of an OTLP endpoint over HTTP that spans are sent to, as `http://localhost:4318`; null makes none."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that are traced; of a request with a `traceparent`, its sender decides."""

    @field_validator("traces")
    @classmethod
    def _is_an_endpoint(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it must be a URL of http or https, as http://localhost:4318")
        if parts.username is not None or parts.password is not None:
            # Of this type, so that the message does not show the value.
            raise PydanticCustomError(
                SECRET,
                "a URL with a password would stand in logs; put headers into OTEL_EXPORTER_OTLP_HEADERS",
            )
        return url


class ServeConfig(Section):
    """The online service."""

    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 exposes the service."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    max_top_k: Annotated[int, Field(gt=0)] = 100
    """Most results per query."""
    max_rerank: Annotated[int, Field(gt=0)] = 50
    """Most candidates that one query may have scored by the fine stage."""
    max_batch: Annotated[int, Field(gt=0)] = 16
    """Queries embedded in one forward pass."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.005
    """How long a query waits for others to share its pass."""
    num_threads: Annotated[int, Field(ge=0)] = 2
    """CPU threads of each backbone replica; 0 leaves torch's default."""
    vision_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory of each replica, beside the weights, for what the vision tower made of candidates that come again."""
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """The same for keys and values of their images, which spare the language model's pass over them, too, and take
    several times as much."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 16 * 2**20
    """Largest request body."""
    max_inputs: Annotated[int, Field(gt=0)] = 256
    """Most inputs of one embeddings request."""
    max_queued_requests: Annotated[int, Field(gt=0)] = 128
    """Requests that may wait for a busy model or index; more are answered 503 at once, to be tried again."""
    follow_index: bool = False
    """Go where the index's pointer goes, without a restart: to a new version, or back to an older one."""
    poll_s: Annotated[float, Field(gt=0)] = 0.5
    """How often a replica looks for the version that it should answer from, and whether partitions answer."""
    keep_previous: bool = True
    """Keep the version before loaded, so that a way back takes no time; its codes take memory."""
    admin: bool | None = None
    """Whether `POST /admin/index` moves the service to another version; if null, only where `host` is a loopback
    address, as nobody is asked for a key."""
    on_lost_partition: Literal["degrade", "fail"] = "degrade"
    """Where a partition of the index is lost or late: answer from the rest, marked `degraded`, or not at all (503)."""
    partition_timeout_s: Annotated[float, Field(gt=0)] = 2.0
    """How long a partition has for its part of an answer."""
    access: AccessConfig = AccessConfig()
    """Keys, scopes and rates."""
    links: LinksConfig = LinksConfig()
    """Images by URL."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Logs, metrics and traces."""

    @property
    def has_admin(self) -> bool:
        """Whether versions can be changed over HTTP."""
        return is_loopback(self.host) if self.admin is None else self.admin


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; of names, only of `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
