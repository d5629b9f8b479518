"""Settings of the online service, the section `serve` of a recipe."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from slq.config import SECRET, Section

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of adapters in requests."""
Openness = Literal["open", "key", "off"]


class AccessConfig(Section):
    """Who may ask, and how much.

    Keys are in `keys_file`, or in the environment variable `SLQ_API_KEYS` of the machines, in the same form. With
    neither, nobody is asked for a key.
    """

    keys_file: Path | None = None
    """JSON file of hashed keys, made with `slq keys add`; it is read again when it changes."""
    required: bool = False
    """Refuse to start without keys, on a loopback address too."""
    open: bool = False
    """Let everyone ask, without a key, on an address that other machines can reach."""
    metrics: Openness = "open"
    """Who may read `/metrics`: everyone, whoever has a key, or nobody (404)."""
    docs: Openness = "open"
    """Who may read `/docs`, `/redoc` and `/openapi.json`."""
    rate_shares: Annotated[int, Field(gt=0)] = 1
    """Ingress replicas among which each key's rate and burst are divided: each counts for itself."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send a body; then it is cut off (408)."""


class LinksConfig(Section):
    """Whether images may be named by URL; the service then fetches from the internet what strangers name."""

    enabled: bool = False
    """Fetch them; otherwise a URL is an error."""
    schemes: tuple[Literal["https", "http"], ...] = ("https",)
    """Of URLs and of where they redirect to."""
    ports: tuple[Annotated[int, Field(gt=0, lt=65536)], ...] = (80, 443)
    """Ports that may be asked."""
    hosts: tuple[str, ...] = ()
    """The only hosts that may be asked, by name, or by `.example.com` with all below it; any public one if empty."""
    max_bytes: Annotated[int, Field(gt=0)] = 20 * 2**20
    """Largest image."""
    max_links: Annotated[int, Field(gt=0)] = 8
    """Most URLs in one request; they are fetched at the same time."""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """How long an image may take from first to last, with name lookup and redirects."""
    max_redirects: Annotated[int, Field(ge=0)] = 3
    """Redirects that are followed; each place is checked as the first."""


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


class Scaling(Section):
    """How many replicas a deployment has, and how much each of them takes on."""

    min_replicas: Annotated[int, Field(gt=0)] = 1
    """At the start, and when nothing is asked. With one, whoever asks while it is replaced waits; two lose no time."""
    max_replicas: Annotated[int, Field(gt=0)] = 1
    """That autoscaling may reach."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    """Calls in each replica, waiting or running, that autoscaling aims at."""
    max_ongoing_requests: Annotated[int, Field(gt=0)] = 32
    """Calls that one replica takes at once; further ones wait with whoever calls, see `serve.max_queued_requests`."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5.0
    """How long more replicas must have been called for before they are started."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 60.0
    """How long fewer must have sufficed before some are drained and stopped."""
    look_back_s: Annotated[float, Field(gt=0)] = 10.0
    """Over which calls are averaged; longer ones sway the number of replicas less."""

    @model_validator(mode="after")
    def _in_order(self) -> "Scaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, less than min_replicas, which is {self.min_replicas}; raise it"
            )
        return self


class BackboneScaling(Scaling):
    """Of the model, whose load is the time in which its passes run."""

    target_busy: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of time in which each replica should run passes, averaged over `look_back_s`; autoscaling aims at that and
    at `target_ongoing_requests`, whichever wants more replicas."""


class IngressScaling(Scaling):
    """Of the HTTP face, which only waits for the others."""

    target_ongoing_requests: Annotated[float, Field(gt=0)] = 64
    """As of `Scaling`."""
    max_ongoing_requests: Annotated[int, Field(gt=0)] = 1024
    """Above `serve.max_in_flight`, which refuses in our shape."""


class IndexScaling(Scaling):
    """Of what searches."""

    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    """As of `Scaling`."""
    max_ongoing_requests: Annotated[int, Field(gt=0)] = 64
    """As of `Scaling`; as many threads search."""


class ScalingConfig(Section):
    """Replicas of each deployment of the service."""

    ingress: IngressScaling = IngressScaling()
    """HTTP. More of them use more cores for parsing and encoding bodies."""
    backbone: BackboneScaling = BackboneScaling()
    """Embeds and scores: each replica has the weights and `resources.gpus_per_worker` GPUs."""
    index: IndexScaling = IndexScaling()
    """Searches, or asks the partitions. An engine that lets only one process in has one replica all the same."""
    partition: IndexScaling = IndexScaling()
    """Of each partition, where `resources.index_partitions` is more than one."""


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
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.0
    """How long a query waits for others to share its pass. With 0 those share one that came while the last one ran."""
    num_threads: Annotated[int, Field(ge=0)] = 2
    """CPU threads of each backbone replica; 0 leaves torch's default."""
    vision_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory of each replica, beside the weights, for what the vision tower made of candidates that come again."""
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """The same for keys and values of their images, which spare the language model's pass over them, too, and take
    several times as much."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 16 * 2**20
    """Largest request body. Proxies take 64 MiB at most, whatever is set here."""
    max_inputs: Annotated[int, Field(gt=0)] = 256
    """Most inputs of one embeddings request."""
    max_pixels: Annotated[int, Field(gt=0)] = 100_000_000
    """Most pixels of all its images together; each takes three bytes once it is decoded, however small its file is."""
    max_queued_requests: Annotated[int, Field(gt=0)] = 32
    """Calls of one ingress replica that may wait for a busy model or index; more are answered 503 at once, to be tried
    again. With `scaling.backbone.max_ongoing_requests` it bounds how long an answer may take."""
    max_wait_s: Annotated[float, Field(gt=0)] = 0.5
    """How long a request may have to wait for those that an ingress replica has in hand, at the pace of its answers;
    more are answered 503 at once."""
    max_in_flight: Annotated[int, Field(gt=0)] = 512
    """Requests that one ingress replica has in hand, whatever they wait for; more are answered 503 at once."""
    max_in_flight_bytes: Annotated[int, Field(gt=0)] = 512 * 2**20
    """The same for their bodies together; one without a length counts as `max_body_bytes`."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """After which a request is given up with 504, whatever it waits for."""
    patience_s: Annotated[float, Field(gt=0)] = 10.0
    """How long a replica may be silent before the same is asked of another one beside it, once; in place of a dead one
    another is asked at once. With `is_together` there is nobody else to ask."""
    is_together: bool = False
    """Have ingress, model and index in one process, whose replicas scale as `scaling.backbone` says: each query spares
    two calls between processes, and each replica holds the index, too. Partitions stay processes of their own."""
    scaling: ScalingConfig = ScalingConfig()
    """Replicas of each deployment."""
    adapters: dict[Annotated[str, Field(pattern=MODEL_NAME)], Path] = Field(default_factory=dict)
    """Further adapters of the same backbone, chosen by the `model` of a request: name -> folder. The service's own is
    `slq`."""
    adapters_dir: Path | None = None
    """Folder below which `POST /admin/adapters` finds further ones while the service runs; the run folder if null."""
    follow_index: bool = False
    """Go where the index's pointer goes, without a restart: to a new version, or back to an older one."""
    poll_s: Annotated[float, Field(gt=0)] = 0.5
    """How often a replica looks for the version that it should answer from, and whether partitions answer."""
    keep_previous: bool = True
    """Keep the version before loaded, so that a way back takes no time; its codes take memory."""
    admin: bool | None = None
    """Whether `/admin/index` moves the service to another version, and `/admin/adapters` adds and removes adapters; if
    null, whoever has a key of scope `admin` may, and where nobody is asked for a key, only if `host` is a loopback
    address."""
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
        """Whether versions can be changed over HTTP where nobody is asked for a key."""
        return is_loopback(self.host) if self.admin is None else self.admin


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; of names, only of `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
