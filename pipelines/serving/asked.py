"""What is known of the request that is being answered, beside its body."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

SEARCH, ADMIN = "search", "admin"
SCOPES = (SEARCH, ADMIN)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        request_id: Under which logs, traces and the answer's `x-request-id` name it.
        client: The name of the key that it came with; empty where nobody is asked for one.
        tenant: Whose caches it may find things in.
        scopes: What it may do; nothing where its path needs no key, and outside of any request.
        accepted: When its headers were there (s, of `time.perf_counter`).
    """

    request_id: str = ""
    client: str = ""
    tenant: str = ""
    scopes: frozenset[str] = frozenset()
    accepted: float = field(default_factory=time.perf_counter)


_NOW: ContextVar[Asked | None] = ContextVar("asked", default=None)


def asked() -> Asked:
    """The request that is being answered; one of nobody, who may do nothing, outside of any."""
    return _NOW.get() or Asked()


def answering(request: Asked) -> None:
    """Say which request the code that is called from here on answers."""
    _NOW.set(request)
