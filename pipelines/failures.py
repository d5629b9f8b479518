"""Errors of ours that travel as data: raised in a worker of Ray Data, one would reach the driver as text of Ray's."""

import json
from typing import Any

import slq.errors
from slq.errors import SlqError

FAILURE = "failure"
"""The column that holds one."""


def failure_text(error: SlqError) -> str:
    """An error of ours as text, which `raise_failure` reads."""
    return json.dumps([type(error).__name__, str(error)])


def raise_failure(record: dict[str, Any]) -> None:
    """Raise the error that a record carries, if it does.

    Raises:
        SlqError: Of the class and with the message that it had in the worker.
    """
    if record.get(FAILURE):
        name, message = json.loads(record[FAILURE])
        kind: type[SlqError] = getattr(slq.errors, name)
        if not issubclass(kind, slq.errors.MediaError | slq.errors.UnusablePairError):
            raise kind(message)
        raise slq.errors.DataError(message)
