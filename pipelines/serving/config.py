"""Settings of the online service, the section `serve` of a recipe."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slq.config import Section

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
    """What the service tells of itself."""


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
    max_pixels: Annotated[int, Field(gt=0)] = 100_000_000
    """Most pixels of all its images together; each takes three bytes once it is decoded, however small its file is."""
    max_queued_requests: Annotated[int, Field(gt=0)] = 128
    """Requests that may wait for a busy model or index; more are answered 503 at once, to be tried again."""
    follow_index: bool = False
    """Go where the index's pointer goes, without a restart: to a new version, or back to an older one."""
    poll_s: Annotated[float, Field(gt=0)] = 0.5
    """How often a replica looks for the version that it should answer from, and whether partitions answer."""
    keep_previous: bool = True
    """Keep the version before loaded, so that a way back takes no time; its codes take memory."""
    admin: bool | None = None
    """Whether `POST /admin/index` moves the service to another version; if null, whoever has a key of scope `admin`
    may, and where nobody is asked for a key, only if `host` is a loopback address."""
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
