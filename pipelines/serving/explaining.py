"""Heat maps over HTTP: where the model looks in the image of an indexed item."""

import asyncio
from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from ray.serve.handle import DeploymentHandle

from pipelines.contents import Message, SearchQuery
from pipelines.messages import error_body
from pipelines.serving.calls import ask
from pipelines.serving.candidates import Stored
from slq.errors import DataError
from slq.reranking.heat import HeatMap
from slq.schema import Item


class ExplainRequest(Message):
    """Body of POST /explain."""

    query: SearchQuery | None = Field(
        default=None, description="text, image or like; only `of` the answer there is a query"
    )
    id: str = Field(description="of an indexed item with an image")
    of: Literal["answer", "latents"] = Field(
        default="answer",
        description="`answer`: when it is about to say whether the item matches the query; `latents`: its latent "
        "queries, when the item is embedded",
    )

    model_config = ConfigDict(
        json_schema_extra={"example": {"query": {"text": "two dogs"}, "id": "test-00003"}}
    )


class ExplainResponse(Message):
    """Answer of POST /explain: attention to the parts of an image."""

    id: str
    of: Literal["answer", "latents"]
    rows: int
    columns: int
    values: list[list[float]] = Field(
        description="rows of columns, from the top left on; their sum is 1"
    )
    covers: Literal["image", "square"] = Field(
        description="what the rows and columns cover; `square`: the one that the image stands in the middle of, as "
        "wide as its longer side"
    )
    share: float = Field(description="of all attention, what the image gets")
    index_version: str


async def explained(
    body: ExplainRequest, backbone: DeploymentHandle, index: DeploymentHandle, *, tenant: str = ""
) -> ExplainResponse | JSONResponse:
    """The map that a request asks for; 404 where an id is unknown.

    Raises:
        DataError: There is no query or one too much, an item has no image, or something cannot be read.
    """
    like = None if body.query is None else body.query.like
    item = await asyncio.to_thread(_query_of, body)
    names = [body.id] if like is None else [body.id, like]
    rows, version = await ask(index.rows_of, names)
    for name, row in zip(names, rows, strict=True):
        if row is None:
            message = f"the index holds no item {name!r}"
            return JSONResponse(error_body(message, "not_found"), 404)
    shown, *others = [Stored.of_row(row) for row in rows]
    if "image" not in shown.modality:
        raise DataError(f"item {body.id!r} has no image in which the model could look")
    query = others[0] if others else item
    heat: HeatMap = await ask(backbone.heat, query, shown, tenant=tenant)
    values = heat.values.tolist()
    return ExplainResponse(
        id=body.id,
        of=body.of,
        rows=len(values),
        columns=len(values[0]),
        values=values,
        covers="square" if heat.covers_square else "image",
        share=heat.share,
        index_version=version,
    )


def _query_of(body: ExplainRequest) -> Item | None:
    """The text and image of a query; None where it is an item of the index, or there is none."""
    if body.of == "latents":
        if body.query is not None:
            raise DataError(
                "an item is embedded whatever is searched for; leave out query, or ask `of` the answer"
            )
        return None
    if body.query is None or body.query.embedding is not None:
        raise DataError(
            "give the query: a text, an image, or the id of an item that others are like"
        )
    return None if body.query.like is not None else body.query.item()
