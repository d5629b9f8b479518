"""Request and response bodies of the HTTP service."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.chats import ChatMessage, content_of
from pipelines.contents import Content, Message, SearchQuery, Text, as_content
from pipelines.serving.config import MODEL_NAME


class SearchRequest(Message):
    """Body of POST /search."""

    query: SearchQuery
    top_k: Annotated[int, Field(gt=0)] = 10
    mode: Literal["auto", "coarse", "fine"] = "auto"
    rerank_k: Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="candidates that the fine stage scores; the recipe's depth by default",
    )
    filter: Annotated[str, Field(min_length=1, max_length=4000)] | None = Field(
        default=None,
        description="only items for which this holds: an SQL predicate over the stored columns, as "
        "`price < 20 and lang = 'de'`; it has no access to anything else",
    )
    budget_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="milliseconds from when the request is accepted, after which no further pass of the fine stage "
        "begins; coarse search takes its time all the same. With 0 the coarse order is answered, and also where a pass "
        "does not end within a further second",
    )
    model: str | None = Field(
        default=None,
        description="the adapter whose embedding space is searched; it must be that of the index, as it is by default",
    )
    explain: bool = Field(
        default=False,
        description="tell of each scored result what the model was about to say; takes the whole vocabulary",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "query": {"text": "two dogs left of a tree"},
                "top_k": 5,
                "mode": "fine",
                "budget_ms": 500,
                "explain": True,
            }
        }
    )


class Explanation(Message):
    """What the model was about to say of a pair: a `Reading` of the whole vocabulary."""

    margin: float = Field(description="in nats; above 0 it takes them for a match")
    probability: float = Field(
        description="of a match: the sigmoid of the margin, over the fitted temperature where rerank.calibration is set"
    )
    is_match: bool | None = Field(
        default=None,
        description="whether the margin reaches the threshold of rerank.calibration; null without one",
    )
    label_mass: float = Field(description="how likely it says any label at all")
    entropy: float = Field(description="of the next token, in nats")
    is_doubtful: bool = Field(description="label_mass is below 0.5, so the margin means little")


class SearchResult(Message):
    """One found item, at its place: results are in order."""

    id: str
    score: float = Field(
        description="the fine score where there is one, else the coarse score; the two do not compare"
    )
    coarse_score: float
    fine_score: float | None = Field(
        default=None, description="of rerank.profile: the margin in nats by default"
    )
    uri: str | None = None
    text: str | None = None
    modality: str | None = Field(
        default=None, description="what was embedded of it: `image`, `text` or `image+text`"
    )
    problem: str | None = Field(
        default=None, description="why the fine stage could not score it; it keeps its coarse place"
    )
    explanation: Explanation | None = Field(
        default=None, description="of a scored result, if `explain` asks for it"
    )


DegradedReason = Literal["partitions", "candidates", "budget"]


class SearchResponse(Message):
    """Answer of POST /search."""

    results: list[SearchResult]
    timings_ms: dict[str, float] = Field(
        description="of stages that do not overlap: `queue`, until a model begins; `embed`, reading the query and its "
        "pass; `search`; `fetch`, reading candidates; `fine`, scoring them"
    )
    reranked: int = Field(description="candidates that the fine stage scored")
    degraded: bool = Field(description="there are `degraded_reasons`")
    degraded_reasons: list[DegradedReason] = Field(
        description="`partitions`: a part of the index did not answer (see shards_ok); `candidates`: some could not be "
        "read or scored (see `problem`); `budget`: `budget_ms` ended before all were scored. What was not scored keeps "
        "its coarse place"
    )
    shards_ok: int = Field(description="partitions of the index that the results come from")
    shards_total: int = Field(description="partitions of the index")
    index_version: str
    fingerprint: str


class IndexRequest(Message):
    """Body of POST /admin/index."""

    version: Annotated[str, Field(pattern=r"^(v\d{6,}|current|previous)$")] = Field(
        description="a name; `current`: where the index's pointer points; `previous`: where the service was before"
    )


class IndexResponse(Message):
    """Answer of POST /admin/index."""

    index_version: str = Field(description="that the service answers from now")
    previous_version: str | None
    seconds: float


class AdapterRequest(Message):
    """Body of POST /admin/adapters."""

    name: Annotated[str, Field(pattern=MODEL_NAME)] = Field(
        description="the `model` of requests; one that is there is replaced"
    )
    folder: str = Field(description="of the adapter, relative to `serve.adapters_dir`")

    model_config = ConfigDict(
        json_schema_extra={"example": {"name": "shop", "folder": "variants/shop"}}
    )


class AdapterResponse(Message):
    """Answer of POST and DELETE /admin/adapters."""

    name: str
    fingerprint: str


class EmbeddingsRequest(Message):
    """Body of POST /v1/embeddings, in OpenAI's shape; an input may also hold an image, or be a chat."""

    input: Text | Content | Annotated[list[Text | Content], Field(fail_fast=True)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None,
        description="in place of `input`: one input as a chat, with texts and an image (`image_url`)",
    )
    model: Text = "slq"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Text | None = None

    model_config = ConfigDict(
        json_schema_extra={"example": {"input": ["a red apple"], "model": "slq"}}
    )

    @property
    def num_inputs(self) -> int:
        """How many vectors are asked for; nothing is decoded to know it."""
        return len(self.input) if isinstance(self.input, list) else 1

    @model_validator(mode="after")
    def _one_of_them(self) -> "EmbeddingsRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("send either `input` or `messages`")
        return self

    def contents(self) -> list[Content]:
        """The inputs; none is decoded.

        Raises:
            DataError: A chat holds several images.
        """
        if self.messages is not None:
            return [content_of(self.messages)]
        assert self.input is not None
        inputs = self.input if isinstance(self.input, list) else [self.input]
        return [as_content(value) for value in inputs]


def embeddings_response(
    vectors: list[Any], request: EmbeddingsRequest, num_tokens: int
) -> dict[str, Any]:
    """Answer of POST /v1/embeddings from (dimension,) float32 arrays."""
    encoded = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode()
        if request.encoding_format == "base64"
        else vector.tolist()
        for vector in vectors
    ]
    data = [
        {"object": "embedding", "index": n, "embedding": value} for n, value in enumerate(encoded)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


class RerankRequest(Message):
    """Body of POST /v1/rerank, in the shape of Jina and Cohere; query and documents may also be or hold images."""

    query: Text | Content
    documents: Annotated[list[Text | Content], Field(fail_fast=True)]
    model: Text = "slq"
    top_n: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="results that are answered; all by default"
    )
    return_documents: bool = Field(default=False, description="answer each document, too")

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "query": "a red apple",
                "documents": ["fruit on a table", {"text": "two dogs"}],
                "top_n": 1,
            }
        }
    )

    def contents(self) -> list[Content]:
        """The documents; none is decoded."""
        return [as_content(document) for document in self.documents]


class RerankResult(Message):
    """One document at its place."""

    index: int = Field(description="its position in `documents`")
    relevance_score: float = Field(
        description="the sigmoid of the margin, in 0..1; 0 where there is a problem"
    )
    document: Content | None = None
    problem: str | None = Field(default=None, description="why it could not be read or scored")


class RerankResponse(Message):
    """Answer of POST /v1/rerank: the best first, documents with a problem at the end."""

    results: list[RerankResult]
    model: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


_MAX_MESSAGE_CHARS = 2000


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape; a message that repeats what a client sent stays short, and is told as UTF-8."""
    told = message[:_MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode("utf-8")
    return {"error": {"message": told, "type": kind, "param": None, "code": code}}
