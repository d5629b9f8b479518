"""API keys: made once, kept as hashes, found in constant time.

A key is 256 random bits, so its plain sha256 cannot be turned back: there is nothing to guess that salt or a slow hash
would make slower, and a fast hash lets every request be checked.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from slq.config import Section
from slq.errors import ConfigError, StorageError

log = logging.getLogger(__name__)
PREFIX = "slq_"
_FORM = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")
_OTHERS_WRITE, _OTHERS_READ = 0o022, 0o044


class ApiKey(Section):
    """One key, without the key itself."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Under which logs and metrics name whoever has it."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key."""
    scopes: Annotated[tuple[Literal["search", "admin"], ...], Field(min_length=1)] = ("search",)
    """What it may do."""
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """Whose caches it uses; its own where this is empty."""
    requests_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How many requests it may make in the long run; any number if null."""
    burst: Annotated[int, Field(gt=0)] | None = None
    """How many it may make at once; as many as in one second if null."""
    expires: AwareDatetime | None = None
    """From when on it is refused; never if null."""

    @property
    def owner(self) -> str:
        """Whose caches it uses."""
        return self.tenant or self.name

    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires


_LIST = TypeAdapter(list[ApiKey])


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def find(keys: Sequence[ApiKey], given: str) -> ApiKey | None:
    """The key that was given, or None.

    Every key is compared in constant time and none ends the search, so time tells nothing of the others.
    """
    if not _FORM.fullmatch(given):
        return None
    digest, found = digest_of(given), None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def parse_keys(text: str, *, source: str) -> list[ApiKey]:
    """Keys as JSON tells them.

    Args:
        text: A list of objects with the fields of `ApiKey`.
        source: Where it comes from, for messages.

    Raises:
        ConfigError: It is no such list, or two keys share a name or a hash, or caches by accident. Values are not
            shown: one may be a key.
    """
    try:
        keys = _LIST.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{source} is no list of API keys: {place}: {first['msg']}; make it with `slq keys add`"
        ) from None
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise ConfigError(f"{source} holds two API keys of the same {what}")
    _check_owners(keys, source)
    return keys


def _check_owners(keys: Sequence[ApiKey], source: str) -> None:
    """Refuse that a key without a tenant, whose caches go by its name, has them with a tenant that is called so."""
    alone = {key.name: number for number, key in enumerate(keys, 1) if not key.tenant}
    for number, key in enumerate(keys, 1):
        if key.tenant in alone:
            raise ConfigError(
                f"{source}: the tenant of API key {number} is the name of API key {alone[key.tenant]}, which has no "
                "tenant; give that one the same tenant if they shall share caches, or choose another tenant"
            )


def read_keys(path: Path) -> list[ApiKey]:
    """Keys of a file.

    Raises:
        ConfigError: It cannot be read or is damaged, or others than its owner may write to it.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"API keys {path} cannot be read: {reason}") from None
    if mode & _OTHERS_WRITE:
        raise ConfigError(
            f"others than its owner may write to the API keys {path}; run `chmod 600 {path}`"
        )
    if mode & _OTHERS_READ:
        log.warning("others than its owner may read the hashes of API keys in %s", path)
    return parse_keys(text, source=str(path))


def _locked(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"), mode=0o600)


def add_key(path: Path, make: Callable[[str], ApiKey]) -> str:
    """Make a key and keep its hash in a file, which is made if it is not there.

    Args:
        path: The file.
        make: Gives the entry of a hash.

    Returns:
        The key: it is nowhere else.

    Raises:
        ConfigError: The file is damaged, or holds a key of this name, or one that would share caches by accident.
        StorageError: It cannot be written.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    entry = make(digest_of(key))
    with _locked(path):
        keys = read_keys(path) if path.exists() else []
        if any(one.name == entry.name for one in keys):
            raise ConfigError(
                f"{path} already holds a key {entry.name!r}; choose another name or remove it first"
            )
        _check_owners([*keys, entry], str(path))
        _write(path, [*keys, entry])
    return key


def remove_key(path: Path, name: str) -> None:
    """Forget a key; a service that reads the file refuses it from then on.

    Raises:
        ConfigError: The file is missing or damaged, or has no key of this name.
        StorageError: It cannot be written.
    """
    with _locked(path):
        keys = read_keys(path)
        left = [one for one in keys if one.name != name]
        if len(left) == len(keys):
            known = ", ".join(one.name for one in keys) or "none"
            raise ConfigError(f"{path} has no key {name!r}; it has: {known}")
        _write(path, left)


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    """Whole or not at all, and for nobody else's eyes from the first byte on."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    values = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123 - of a handle
            json.dump(values, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None
