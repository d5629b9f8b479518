"""Fetches images that strangers name by URL, from the public internet only.

The name is looked up once, every address that it has must be public, and the connection goes to one of those: there is
no second lookup that could answer otherwise. A redirect is a new URL. Whatever fails on the network is told in the same
words, so nobody can find out with our help what there is in our network.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpcore

from pipelines.addresses import is_public
from pipelines.contents import Content, FetchedContent, Readable
from pipelines.serving.config import LinksConfig
from slq.errors import DataError, MediaError

log = logging.getLogger(__name__)
Resolve = Callable[[str, int], Awaitable[list[str]]]
_UNREACHABLE = "the image's URL cannot be fetched; send the bytes as a data URI"
_URL_FORM = re.compile(r"[\x21-\x7e]{1,2048}")
_NAME_FORM = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z0-9-]{2,63}"
)
_LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "arpa")
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_FETCHES, _LOOKUP_THREADS = 32, 8


class _LinkRefusedError(Exception):
    """A URL is not asked, or did not give an image; the log says why, and nobody else."""


@dataclass(frozen=True, slots=True)
class Place:
    """A URL, taken apart once: nothing reads it again in another way.

    Attributes:
        scheme: `http` or `https`.
        host: A name or an address, without brackets, in lower case.
        port: To connect to.
        target: Path and query.
    """

    scheme: str
    host: str
    port: int
    target: str


def place_of(url: str, settings: LinksConfig) -> Place:
    """What a URL names, if it may be asked at all.

    Raises:
        MediaError: With reason `url_refused`; only the URL itself is looked at.
    """
    if not _URL_FORM.fullmatch(url) or "\\" in url:
        raise _refused("it must be at most 2048 printable ASCII characters without a backslash")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused("it is malformed") from None
    if parts.scheme not in settings.schemes:
        raise _refused(f"its scheme must be {' or '.join(settings.schemes)}")
    if "@" in parts.netloc:
        raise _refused("it must hold no user or password")
    host = (parts.hostname or "").lower()
    _check_host(host, is_bracketed="[" in parts.netloc)
    if settings.hosts and not any(_is_below(host, known) for known in settings.hosts):
        raise _refused("its host is not one that this service asks")
    port = _PORTS[parts.scheme] if port is None else port
    if port not in settings.ports:
        raise _refused(f"its port must be {' or '.join(map(str, settings.ports))}")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(parts.scheme, host, port, target)


def _refused(why: str) -> MediaError:
    return MediaError("url_refused", f"the image's URL is refused: {why}")


def _check_host(host: str, *, is_bracketed: bool) -> None:
    """A canonical address, or a name with a dot that is no local one; no other spelling of an address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if is_bracketed:
        is_good = isinstance(address, ipaddress.IPv6Address)
    elif address is not None:
        is_good = True
    else:
        last = host.rpartition(".")[2]
        is_good = bool(_NAME_FORM.fullmatch(host)) and not last[:1].isdigit()
        is_good = is_good and last not in _LOCAL_NAMES
    if not is_good:
        raise _refused("its host must be an address or a full public name")


def _is_below(host: str, known: str) -> bool:
    return host == known.lower() or (known.startswith(".") and host.endswith(known.lower()))


class _PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, whatever the host is called."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - it was looked up already
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class Links:
    """Fetches images by URL.

    Args:
        settings: What may be asked.
        resolve: Gives the addresses of a name; the machine's own lookup by default.
        is_allowed: Whether an address may be asked.
    """

    def __init__(
        self,
        settings: LinksConfig,
        resolve: Resolve | None = None,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._settings = settings
        self._resolve = resolve or self._look_up
        self._is_allowed = is_allowed
        self._free = asyncio.Semaphore(_MAX_FETCHES)
        # Not the loop's threads, in which images are decoded: a slow name server would take them all.
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._tls: ssl.SSLContext | None = None

    async def readable(self, contents: Sequence[Content]) -> list[Readable]:
        """Contents that can be read without a network, in order: what a URL names is fetched, all at the same time.

        One that gives no image says so when it is read. Where links are off, contents stay as they are.

        Raises:
            DataError: There are too many URLs.
        """
        wanted = {content.link for content in contents} - {None}
        if not self._settings.enabled or not wanted:
            return list(contents)
        if len(wanted) > self._settings.max_links:
            raise DataError(
                f"the request names {len(wanted)} images by URL; at most {self._settings.max_links} are fetched"
            )
        links = [link for link in wanted if link is not None]
        images = dict(zip(links, await asyncio.gather(*map(self._told, links)), strict=True))
        return [
            content if content.link is None else FetchedContent(content.text, images[content.link])
            for content in contents
        ]

    async def _told(self, url: str) -> bytes | DataError:
        try:
            return await self.fetch(url)
        except DataError as error:
            return error

    async def fetch(self, url: str) -> bytes:
        """What a URL gives; not decoded, and not yet known to be an image.

        Raises:
            MediaError: `url_refused`: it may not be asked; `too_many_bytes`; `url_failed`: anything else, in words that
                are always the same.
        """
        try:
            async with asyncio.timeout(self._settings.timeout_s), self._free:
                return await self._follow(url)
        except MediaError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign server or its name brings about
            # No URL: it may hold a secret of who sent it.
            log.info("an image's URL was not fetched: %s: %s", type(error).__name__, error)
            raise MediaError("url_failed", _UNREACHABLE) from None

    async def _follow(self, url: str) -> bytes:
        for number in range(self._settings.max_redirects + 1):
            try:
                place = place_of(url, self._settings)
            except MediaError as error:
                if number == 0:
                    raise
                raise _LinkRefusedError(f"redirected: {error}") from None
            found = await self._get(place)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise _LinkRefusedError("too many redirects")

    async def _addresses(self, place: Place) -> list[str]:
        try:
            addresses = [str(ipaddress.ip_address(place.host))]
        except ValueError:
            addresses = await self._resolve(place.host, place.port)
        # One that is not public among others is reason enough: whoever answers so is up to something.
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise _LinkRefusedError("an address is not public")
        return addresses

    async def _look_up(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]

    async def _get(self, place: Place) -> bytes | str:
        """The body of an answer, or where it redirects to."""
        if place.scheme == "https" and self._tls is None:
            self._tls = httpcore.default_ssl_context()
        backend = _PinnedBackend(await self._addresses(place))
        url = httpcore.URL(
            scheme=place.scheme, host=place.host, port=place.port, target=place.target
        )
        headers = [("accept", "image/*"), ("accept-encoding", "identity"), ("user-agent", "slq")]
        async with (
            httpcore.AsyncConnectionPool(self._tls, network_backend=backend, retries=0) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            return await self._read(response)

    async def _read(self, response: httpcore.Response) -> bytes | str:
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in _REDIRECTS and b"location" in headers:
            return headers[b"location"].decode("ascii")
        if response.status != 200:
            raise _LinkRefusedError(f"status {response.status}")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _LinkRefusedError("its answer is compressed")
        limit, size = self._settings.max_bytes, 0
        if int(headers.get(b"content-length", b"0")) > limit:
            raise _too_large(limit)
        parts = []
        async for part in response.aiter_stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
        return b"".join(parts)


def _too_large(limit: int) -> MediaError:
    return MediaError(
        "too_many_bytes",
        f"the image behind the URL has more than {limit} bytes, which is the limit",
    )
