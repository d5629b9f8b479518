"""Settings of `slq karr`, in a recipe's section `karr`."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from slq.config import SECRET, Section

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
_VARIABLE = r"[A-Z_][A-Z0-9_]*"


class EndpointConfig(Section):
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = "http://127.0.0.1:8001/v1"
    """Base address; `/chat/completions` is added. Without a name, a key or a query in it."""
    model: str = "default"
    """As the endpoint calls it."""
    api_key_env: str | None = None
    """Environment variable, of driver and workers, that holds the key, in capitals; none is sent if null."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Of one request."""
    attempts: Positive = 5
    """Requests for one answer, with growing waits after a timeout, a lost connection, 408, 429 or 5xx."""
    max_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """Longest wait between two of them."""
    concurrency: Positive = 8
    """Requests under way at once, of all workers together."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Rate limit, of all workers together; none if null."""
    max_tokens: Positive = 400
    """Of an answer; more than any good one has."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Another seed gives another answer above 0 only."""
    json_mode: bool = True
    """Ask for `response_format: json_object`; some servers do not know it."""
    max_answer_bytes: Positive = 2**18
    """A longer answer is cut off, and counts as unparseable."""

    # Both of a type whose message does not show the value: a pasted key would stand in logs.
    @field_validator("url", mode="before")
    @classmethod
    def _is_a_bare_address(cls, url: Any) -> Any:
        if not isinstance(url, str) or not re.fullmatch(r"https?://[^\s@?#]+", url):
            raise PydanticCustomError(
                SECRET,
                "it must be a URL of http or https without user, query or fragment, as http://127.0.0.1:8001/v1; a "
                "key goes into the environment variable that api_key_env names",
            )
        return url

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _is_a_name(cls, name: Any) -> Any:
        if name is not None and not (isinstance(name, str) and re.fullmatch(_VARIABLE, name)):
            raise PydanticCustomError(
                SECRET,
                "it must be the name of an environment variable, of capitals, digits and _, such as OPENAI_API_KEY; "
                "the key itself stands in no recipe",
            )
        return name


class LocalConfig(Section):
    """A language model that transformers loads."""

    name: str
    """A folder or a hub id with a chat template."""
    revision: str | None = None
    """Commit of a hub id."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    max_tokens: Positive = 400
    """Of an answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 takes the likeliest token each time; then `tries` above 1 gives the same answer again."""


class ModelConfig(Section):
    """Which language model is asked."""

    kind: Literal["clues", "endpoint", "local"] = "clues"
    """`clues`: no model, the clue table of the shipped scenes. `endpoint` or `local`: that section."""
    endpoint: EndpointConfig | None = None
    """A model behind HTTP."""
    local: LocalConfig | None = None
    """A model in the actors' own memory."""

    @model_validator(mode="after")
    def _has_its_section(self) -> "ModelConfig":
        if self.kind != "clues" and getattr(self, self.kind) is None:
            raise ValueError(f"kind {self.kind} needs a section `{self.kind}` beside it")
        return self

    @property
    def model(self) -> str:
        """What the provenance of a row calls it."""
        if self.kind == "endpoint" and self.endpoint is not None:
            return self.endpoint.model
        return self.local.name if self.kind == "local" and self.local is not None else "clue_table"


class RewriterConfig(ModelConfig):
    """Who rewrites captions."""

    tries: Positive = 2
    """Answers that are asked for at most, each with another seed, until one passes the checks of its words."""
    ask_whether_named: bool = False
    """Ask the model, too, whether the new caption names the target."""


class JudgeConfig(Section):
    """Somebody who accepts or rejects a new caption."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    """Under which its votes stand."""
    kind: Literal["clues", "endpoint", "local", "frozen"] = "frozen"
    """`frozen`: the recipe's own model, which is asked whether image and caption match. `clues`: the clue table."""
    endpoint: EndpointConfig | None = None
    """A model behind HTTP."""
    local: LocalConfig | None = None
    """A model in the actors' own memory."""
    with_image: bool = False
    """Send the image to the endpoint, too."""
    framing: str = "mcq"
    """How a frozen judge is asked; a key of `slq.reranking.framings.FRAMINGS`."""
    min_margin: float = 0.0
    """Nats from which a frozen judge accepts."""

    @model_validator(mode="after")
    def _has_its_section(self) -> "JudgeConfig":
        if self.kind in ("endpoint", "local") and getattr(self, self.kind) is None:
            raise ValueError(f"judge {self.name}: kind {self.kind} needs a section `{self.kind}`")
        if self.with_image and self.kind != "endpoint":
            raise ValueError(f"judge {self.name}: with_image is for kind endpoint")
        return self


class IdentifyConfig(Section):
    """Whether a new caption finds its own image among that image's nearest neighbours."""

    by: Literal["off", "coarse", "fine"] = "off"
    """`coarse`: by cosine of `system`; `fine`: by the fine stage's margin; `off`: unchecked, as the funnel says."""
    system: Literal["slq", "untrained", "last_token"] = "slq"
    """Whose vectors say which images are neighbours: the trained adapter's, or a zero-shot system's."""
    neighbours: Positive = 8
    """Images that are nearest to a caption's own."""
    min_lead: float = 0.0
    """By how much the own image's score must be above every neighbour's: cosine, or nats."""


class ReviewConfig(Section):
    """What people say of the candidates."""

    required: bool = False
    """Whether a candidate that nobody has accepted is left out."""
    page_rows: Positive = 250
    """Candidates of one page of the review sheet."""


class KarrConfig(Section):
    """How a knowledge-aware benchmark is built out of captioned images."""

    captions: Path | None = None
    """Parquet of `id`, `image` or `uri`, and `text`, below `data.dir` if relative; the queries, relevance and corpus
    of the data section if null."""
    kinds: tuple[str, ...] = ()
    """Of the data section's queries only those of these kinds; all if empty."""
    captions_per_image: Positive = 1
    """The first captions of an image that are taken; 1 gives pairs one to one."""
    rewriter: RewriterConfig = RewriterConfig()
    """Who chooses targets and words captions anew."""
    wordnet: tuple[str, ...] = ()
    """Lexicons of the package `wn`, such as `oewn:2024` and `omw-fr:1.4`: the first is of the captions' language and
    gives synonyms, the others give translations. They must be there on every node."""
    identify: IdentifyConfig = IdentifyConfig()
    """Whether a new caption must find its image."""
    judges: tuple[JudgeConfig, ...] = ()
    """Who votes on what has passed all checks."""
    min_accept_share: Share = 0.5
    """Share of the judges' votes that must accept a candidate."""
    review: ReviewConfig = ReviewConfig()
    """What people's decisions are worth, and their sheet."""
    gallery: Literal["kept", "all"] = "kept"
    """Images of the benchmark's gallery: those of its rows, or all that were read."""
    max_caption_chars: Positive = 400
    """Of a new caption."""
    max_clue_words: Positive = 30
    """That stand for the target, articles left out."""
    shard_rows: Positive = 64
    """Captions per shard, the unit of retry and of commit."""
    workers: Positive = 1
    """Actors; each holds the models that the recipe asks for."""
    seed: int = 0
    max_error_share: Share = 0.1
    """Share of captions without an answer or a readable image above which the run fails."""

    @field_validator("judges")
    @classmethod
    def _named_apart(cls, judges: tuple[JudgeConfig, ...]) -> tuple[JudgeConfig, ...]:
        names = [judge.name for judge in judges]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two judges are called {twice}; give each a name of its own")
        return judges
