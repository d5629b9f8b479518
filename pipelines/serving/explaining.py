"""Heat maps over HTTP: where the model looks in the image of an indexed item."""

from collections.abc import Sequence
from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from ray.serve.handle import DeploymentHandle

from pipelines.contents import Content, Message, SearchQuery, Text
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
    id: Text = Field(description="of an indexed item with an image")
    of: Literal["answer", "latents"] = Field(
        default="answer",
        description="`answer`: when it is about to say whether the item matches the query; `latents`: its latent "
        "queries, when the item is embedded",
    )

    model_config = ConfigDict(
        json_schema_extra={"example": {"query": {"text": "two dogs"}, "id": "test-00003"}}
    )

    def contents(self) -> list[Content]:
        """The query's text and image; none where it is an item of the index, or there is none.

        Raises:
            DataError: There is no query, or one too much.
        """
        if self.of == "latents":
            if self.query is not None:
                raise DataError(
                    "an item is embedded whatever is searched for; leave out query, or ask `of` the answer"
                )
            return []
        if self.query is None or self.query.embedding is not None:
            raise DataError(
                "give the query: a text, an image, or the id of an item that others are like"
            )
        return [] if self.query.like is not None else [self.query]


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
    body: ExplainRequest,
    items: Sequence[Item],
    backbone: DeploymentHandle,
    index: DeploymentHandle,
    *,
    tenant: str = "",
    patience_s: float | None = None,
) -> ExplainResponse | JSONResponse:
    """The map that a request asks for; 404 where an id is unknown.

    Args:
        body: The request.
        items: Its contents, read.
        backbone: Looks.
        index: Knows the items.
        tenant: Whose request it is.
        patience_s: How long a replica may be silent before another is asked.

    Raises:
        DataError: The item has no image, or something cannot be read.
    """
    like = None if body.query is None else body.query.like
    names = [body.id] if like is None else [body.id, like]
    rows, version = await ask(index.rows_of, names, patience_s=patience_s)
    for name, row in zip(names, rows, strict=True):
        if row is None:
            message = f"the index holds no item {name!r}"
            return JSONResponse(error_body(message, "not_found"), 404)
    shown, *others = [Stored.of_row(row) for row in rows]
    if "image" not in shown.modality:
        raise DataError(f"item {body.id!r} has no image in which the model could look")
    query = next(iter([*others, *items]), None)
    heat: HeatMap = await ask(backbone.heat, query, shown, tenant=tenant, patience_s=patience_s)
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
