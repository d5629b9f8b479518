"""`slq keys`: makes, shows and removes the API keys of a service."""

import json
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.console import AsJson, err, friendly_errors, out
from slq.errors import ConfigError

app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    help="Make, show and remove API keys of a service; its file holds only their hashes.",
    epilog="Example: slq keys add keys.json alice, then: slq serve RECIPE --set serve.access.keys_file=keys.json",
)
KeysFile = Annotated[Path, typer.Argument(help="the service's serve.access.keys_file")]
Name = Annotated[str, typer.Argument(help="under which logs and metrics name whoever has the key")]


class Scope(StrEnum):
    """What a key may do."""

    SEARCH = "search"
    ADMIN = "admin"


@app.command(epilog="Example: slq keys add keys.json alice --rate 20 --burst 100 --days 90")
def add(
    file: KeysFile,
    name: Name,
    scope: Annotated[
        list[Scope] | None, typer.Option(help="what it may do; `search` by default (repeatable)")
    ] = None,
    tenant: Annotated[str, typer.Option(help="whose caches it shares; its own by default")] = "",
    rate: Annotated[
        float | None,
        typer.Option(help="requests per second in the long run; any number by default"),
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="requests at once; as many as in one second by default")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0, help="after which it is refused; never by default")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: it cannot be found again. A service that runs knows it within seconds."""
    from pipelines.serving.keys import ApiKey, add_key

    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    values = {
        "name": name,
        "scopes": tuple(dict.fromkeys(scope or [Scope.SEARCH])),
        "tenant": tenant,
        "requests_per_s": rate,
        "burst": burst,
        "expires": expires,
    }

    def make(digest: str) -> ApiKey:
        entry = ApiKey.parse({**values, "sha256": digest}, source="the key")
        assert isinstance(entry, ApiKey)
        return entry

    with friendly_errors():
        if not file.parent.is_dir():
            raise ConfigError(f"the folder {file.parent} does not exist; make it first")
        key = add_key(file, make)
    if as_json:
        print(json.dumps({"name": name, "key": key}))
        return
    err.print(
        f"keep the key of {name}; only its hash is in {file}:", highlight=False, soft_wrap=True
    )
    print(key)


@app.command("list", epilog="Example: slq keys list keys.json --json")
def list_(file: KeysFile, as_json: AsJson = False) -> None:
    """Show the keys of a file, without the keys themselves and without their hashes."""
    from pipelines.serving.keys import read_keys

    with friendly_errors():
        keys = read_keys(file)
    shown = [
        {**key.model_dump(mode="json", exclude={"sha256"}), "tenant": key.owner} for key in keys
    ]
    if as_json:
        print(json.dumps(shown))
        return
    table = Table("name", "scopes", "tenant", "rate", "burst", "expires", box=None)
    for key in keys:
        expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M}"
        if key.has_expired():
            expires = f"[red]{expires}[/]"
        limits = [_number(key.requests_per_s), _number(key.burst)]
        table.add_row(key.name, ", ".join(key.scopes), key.owner, *limits, expires)
    out.print(table)


def _number(value: Any) -> str:
    return "any" if value is None else f"{value:g}"


@app.command(epilog="Example: slq keys remove keys.json alice")
def remove(file: KeysFile, name: Name) -> None:
    """Remove a key; a service that runs refuses it within seconds."""
    from pipelines.serving.keys import remove_key

    with friendly_errors():
        remove_key(file, name)
    out.print(f"[green]done[/] {name} is removed from {file}", highlight=False, soft_wrap=True)
