"""The HTTP face of the service without Ray: its routes and guard, and stand-ins for the deployments behind."""

import asyncio
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ray import serve
from starlette.testclient import TestClient

from pipelines.recipe import Recipe
from pipelines.serving import exposition, telemetry
from pipelines.serving.adapters import Embedded
from pipelines.serving.index_service import Found, Sent
from pipelines.serving.ingress import Ingress, app
from pipelines.serving.pinned import Pinned
from slq.errors import DataError, UnknownModelError
from slq.index import Hit
from slq.media import pixels_sha256
from slq.reranker import Ranked
from slq.reranking.heat import HeatMap
from slq.reranking.profiles import Reading
from slq.schema import Item

DIMENSION, NUM_ITEMS = 4, 5


def remote(answer: Callable[..., Any]) -> SimpleNamespace:
    """A method of a deployment's handle."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(answer, *args, **kwargs)

    return SimpleNamespace(remote=call)


def vector_of(item: Item) -> np.ndarray[Any, Any]:
    """Depends on every pixel and letter, so that equal vectors mean equal items."""
    shown = "" if item.image is None else pixels_sha256(item.image)
    digest = hashlib.sha256(f"{item.text} {shown}".encode()).digest()
    return np.frombuffer(digest[:DIMENSION], np.uint8).astype(np.float32)


class Backbone:
    """Answers as the backbone's deployment does; remembers who asked."""

    def __init__(self) -> None:
        self.tenants: list[str] = []
        self.models = {"slq": "a"}
        self.describe = remote(
            lambda: {
                "fingerprint": "a",
                "models": dict(self.models),
                "dimension": DIMENSION,
                "backbone": "tiny",
            }
        )
        self.embed = remote(self._embed)
        self.rank = remote(self._rank)
        self.add_adapter = remote(self._add)
        self.heat = remote(
            lambda *_, **__: HeatMap(torch.full((2, 3), 1 / 6), share=0.4, covers_square=False)
        )
        self.remove_adapter = remote(lambda name: self.models.pop(name, None))

    def _add(self, name: str, folder: str) -> str:
        self.models[name] = f"of {folder}"
        return self.models[name]

    def _embed(
        self, items: list[Item], tenant: str = "", model: str = "slq", told: Any = None
    ) -> Embedded:
        self.tenants.append(tenant)
        if model not in {*self.models, *self.models.values()}:
            raise UnknownModelError(f"there is no model {model!r}; this service has slq")
        return Embedded([vector_of(item) for item in items], self.models.get(model, model))

    def _rank(self, query: Item, candidates: list[Any], coarse: Any, **_: Any) -> list[Ranked]:
        ranked = []
        for number, candidate in enumerate(candidates):
            score = 0.0 if coarse is None else coarse[number]
            try:
                margin = float(vector_of(candidate.item())[0] - vector_of(query)[0])
            except DataError as error:
                ranked.append(Ranked(number, None, score, problem=str(error)))
                continue
            reading = Reading(margin, 0.9, 0.1, 50)
            ranked.append(Ranked(number, margin, score, reading, probability=reading.probability))
        return sorted(ranked, key=lambda one: -(one.fine_score or 0.0))


class Index:
    """Answers as the index's deployment does."""

    def __init__(self, picture: Path | None) -> None:
        self.describe = remote(
            lambda: {
                "fingerprint": "a",
                "dimension": DIMENSION,
                "shards_ok": 1,
                "shards_total": 1,
                "partitions": [],
                "refused_reason": "a path of ours",
            }
        )
        self.search = remote(self._search)
        self.uri_of = remote(lambda name: str(picture) if name == "item-0" else None)
        self.send = remote(lambda version: Sent(version, None))
        self.rows_of = remote(self._rows_of)

    def _rows_of(self, names: list[str]) -> tuple[list[dict[str, Any] | None], str]:
        known = {f"item-{n}" for n in range(NUM_ITEMS)}
        row = {"uri": None, "text": None, "modality": "image"}
        return [row if name in known else None for name in names], "v000001"

    def _search(self, vector: Any, top_k: int, *_: Any, told: Any = None) -> Found:
        count = min(top_k, NUM_ITEMS)
        hits = [Hit(f"item-{n}", float(vector[n % DIMENSION])) for n in range(count)]
        rows = [{"uri": None, "text": f"text {n}", "modality": "text"} for n in range(count)]
        return Found(hits, rows, "v000001", 1, 1, "a", "a")


async def _metrics(_: list[str]) -> bytes:
    return b"# EOF\n"


class Front:
    """The face with its stand-ins.

    Attributes:
        client: Asks it.
        backbone: What it asks.
        ingress: The replica.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, picture: Path | None = None, **settings: Any
    ) -> None:
        patch.setattr(telemetry, "begin", lambda _: None)  # it changes the loggers of a process
        recipe = Recipe.model_validate({"serve": settings}).model_dump(mode="json")
        self.backbone = Backbone()
        face = Ingress.func_or_class.__bases__[0]  # below what makes an ASGI app of it
        self.ingress = face(recipe, Pinned("a", "v000001"), self.backbone, Index(picture))
        replica = SimpleNamespace(servable_object=self.ingress)
        patch.setattr(serve, "get_replica_context", lambda: replica)
        patch.setattr(exposition, "agents", list)  # there is no Ray
        patch.setattr(exposition, "exposition", _metrics)
        self.client = TestClient(app, raise_server_exceptions=False)


def refusal(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer that must be one in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def png(color: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header promises width x height pixels of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(bytes(min(width + 1, 2**16)) * min(height, 2**10), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
