"""Logs of replicas: our loggers write where Ray Serve's own does, in the same form.

Serve's handlers name deployment, replica and request (its id is that of the header `x-request-id`, which its proxy adds
where a client sent none, and which goes along with every call of a deployment).
"""

import logging
from typing import Any

from ray.serve.schema import LoggingConfig

from pipelines.serving.config import TelemetryConfig

OURS = ("slq", "pipelines")
SERVE = logging.getLogger("ray.serve")
_MOST_CHARACTERS = 200  # of a value in a line; some are what clients sent


def logging_config(settings: TelemetryConfig) -> LoggingConfig:
    """How Ray Serve logs; not each call of a deployment, as our line for each request tells more."""
    return LoggingConfig(
        encoding=settings.logs.upper(), log_level=settings.level, enable_access_log=False
    )


class ToServe(logging.Handler):
    """Hands records to the handlers that Serve has now."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        SERVE.handle(record)


def begin(settings: TelemetryConfig) -> None:
    """Let our loggers write where Serve does, and Serve to standard error as it does into its files."""
    handler = ToServe()
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(settings.level)
        logger.propagate = False
    if settings.logs == "json":
        _write_json_to_stderr()


def _write_json_to_stderr() -> None:
    """Serve writes text there whatever its encoding is (Ray 2.60), and drops what a record holds beside its message."""
    # The formatter and the filters of its files, which add request, deployment and replica.
    files = [one for one in SERVE.handlers if not isinstance(one, logging.StreamHandler)]
    # A package that sets up logging for itself, as pymilvus does, may have closed them: then they have no target.
    targets = [getattr(one, "target", one) for one in files]
    formatters = [one.formatter for one in targets if one is not None]
    for stream in SERVE.handlers:
        if isinstance(stream, logging.StreamHandler) and formatters:
            stream.setFormatter(formatters[0])
            for kept in [one for file in files for one in file.filters]:
                stream.addFilter(kept)


def as_text(facts: dict[str, Any]) -> str:
    """Facts on one line, `key=value`, cut where a value is long; those that are empty are left out."""
    return " ".join(
        f"{key}={_plain(value)}" for key, value in facts.items() if value not in ("", None, [], {})
    )


def cut(value: Any) -> Any:
    """A value as a line may hold it: the beginning of a text that is too long."""
    is_long = isinstance(value, str) and len(value) > _MOST_CHARACTERS
    return f"{value[:_MOST_CHARACTERS]}..." if is_long else value


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    return f"{value:.1f}" if isinstance(value, float) else _printable(str(value))


def _printable(text: str) -> str:
    """A text whose line breaks and other control characters are escaped, so that none begins a line of its own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut(text))
