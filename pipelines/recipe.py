"""A recipe: YAML with one section per stage, each the frozen config object of its owner."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from pipelines.retaining.config import RetentionConfig
from pipelines.serving.config import ServeConfig
from slq.benchmarks.karpathy import KarpathyConfig
from slq.benchmarks.mmeb import MmebConfig
from slq.benchmarks.registry import AnyBenchmark
from slq.benchmarks.scenes import ScenesConfig
from slq.config import Section
from slq.engines import IndexPlace, IndexSettings
from slq.enhancement import EnhancementConfig
from slq.errors import ConfigError
from slq.karr.config import KarrConfig, LocalConfig
from slq.metrics import parse_metric
from slq.reranking.context_free import ContextFree
from slq.reranking.depth import AdaptiveDepth
from slq.reranking.framings import framing_by_name
from slq.reranking.profiles import profile_by_name
from slq.sweeps import SweepConfig
from slq.training import AdapterSettings, TrainConfig


class BackboneConfig(Section):
    """Which frozen model, where and in which type."""

    name: str = "tiny"
    """`tiny`, a folder, or a hub id such as `Qwen/Qwen3-VL-2B-Instruct`."""
    revision: str | None = None
    """Commit of a hub id."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_pixels: int | None = None
    """Largest image area for Qwen-VL vision towers; the processor's default if null."""


CorpusFormat = Literal["auto", "images", "parquet", "webdataset", "jsonl", "csv", "text"]


class DataConfig(Section):
    """Where the records are. `scenes`, `karpathy`, `mmeb` or `benchmark` generate missing files into `dir`."""

    dir: Path = Path("runs/demo/data")
    """Folder that relative file names below belong to."""
    train: Path = Path("train.parquet")
    """Pairs: id, image (bytes) or uri, text; or pairs of items, as `pipelines.pairs.Pairs` reads them."""
    corpus: str = "gallery.parquet"
    """Items to embed, a file or a folder, here or as `s3://bucket/prefix`: images; Parquet, JSONL or CSV with id and
    image, uri and/or text; WebDataset tars; texts, one a line."""
    corpus_format: CorpusFormat = "auto"
    """Told by names if `auto`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """How the corpus calls our columns: ours -> its own."""
    queries: Path = Path("queries.parquet")
    """Queries: id, text and/or image, kind."""
    relevance: Path = Path("relevance.parquet")
    """query_id, item_id, grade."""
    candidates: Path = Path("candidates.parquet")
    """query_id, item_ids, excluded_ids: what a query ranks, if it is not everything; need not exist."""
    negatives: Path = Path("negatives.parquet")
    """Hard negatives of the training pairs: id, negatives, similarities, margins, as `slq mine` writes them."""
    scenes: ScenesConfig | None = None
    """Generate the shipped scenes."""
    karpathy: KarpathyConfig | None = None
    """Make tables of COCO or Flickr30K in Karpathy's splits."""
    mmeb: MmebConfig | None = None
    """Make a table of MMEB-train."""
    benchmark: AnyBenchmark | None = None
    """Make tables of a benchmark from its publisher's files; `format` says which (`slq/benchmarks/registry.py`)."""

    @model_validator(mode="after")
    def _one_origin(self) -> "DataConfig":
        origins = ("scenes", "karpathy", "mmeb", "benchmark")
        given = [name for name in origins if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} would write the same files; keep one of them")
        return self

    def path(self, name: str) -> Path:
        """Absolute or `dir`-relative path of one of the files above."""
        value = Path(getattr(self, name))
        return value if value.is_absolute() else self.dir / value

    @property
    def corpus_location(self) -> str:
        """Where the corpus is: a path or a url."""
        return self.corpus if "://" in self.corpus else str(self.path("corpus"))


class MineConfig(Section):
    """How hard negatives of the training pairs are found."""

    depth: Annotated[int, Field(gt=0)] = 30
    """Nearest images of a caption that are looked at, its own among them."""
    per_pair: Annotated[int, Field(gt=0)] = 4
    """Negatives of a pair at most; the most similar ones are kept."""
    max_share_of_positive: Annotated[float, Field(gt=0)] = 0.95
    """Images whose cosine is above this share of the own image's are taken for right answers and dropped."""
    margins: bool = False
    """Score own image and negatives with the fine stage too, as a teacher; by far the larger part of the work."""

    @model_validator(mode="after")
    def _deep_enough(self) -> "MineConfig":
        if self.per_pair >= self.depth:
            raise ValueError(
                f"per_pair is {self.per_pair}, but {self.depth} images with the own one are looked at; raise depth"
            )
        return self


Output = Literal["float16", "int8", "binary"]
Named = TypeVar("Named", BackboneConfig, LocalConfig)


class EmbedConfig(Section):
    """How a corpus becomes an embedding data set."""

    shard_rows: Annotated[int, Field(gt=0)] = 256
    """Items per shard, the unit of retry and of commit; some 262,144 for large corpora."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """Items per forward pass at most."""
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens per forward pass at most, padding included; a longer item has a pass of its own."""
    piece_rows: Annotated[int, Field(gt=0)] = 4096
    """Items that travel together from reading to writing; batches are sorted by length among them."""
    piece_bytes: Annotated[int, Field(gt=0)] = 64 * 2**20
    """Bytes of prepared tensors in such a piece; what decides for images."""
    outputs: tuple[Output, ...] = ("float16",)
    """Columns of vectors: `embedding`, and on request `embedding_int8` and `embedding_bits`."""
    calibration_rows: Annotated[int, Field(gt=0)] = 2048
    """Items, from all over the corpus, that the ranges of int8 and binary vectors are measured on, once."""
    dimension: Annotated[int, Field(gt=0)] | None = None
    """Keep only this many leading values of each vector (see train.matryoshka); all if null."""
    adapters: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], Path] = Field(
        default_factory=dict
    )
    """Further adapters of the same backbone, embedded in the same pass: name -> folder, column `embedding_NAME`."""
    deterministic: bool = False
    """One item per pass on one thread: the same bits whatever stands beside an item; far slower."""
    num_threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of each encoder actor; 0 leaves torch's default."""
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of quarantined items above which the run fails."""

    @model_validator(mode="after")
    def _float16_is_there(self) -> "EmbedConfig":
        if "float16" not in self.outputs or len(set(self.outputs)) < len(self.outputs):
            raise ValueError(
                "outputs must hold float16, which index and checks read, and nothing twice"
            )
        return self


def _known_framing(name: str) -> str:
    try:
        return framing_by_name(name).name
    except ConfigError as error:
        raise ValueError(str(error)) from None


class RerankConfig(Section):
    """The fine stage."""

    profile: Literal["default", "compat"] = "default"
    """How candidates are ordered: by margin, or with `compat` as RetLLM's release does, by a probability cut to two
    decimals and then entropy."""
    framing: Annotated[str, AfterValidator(_known_framing)] | None = None
    """How a pair is put to the model: `mcq`, `true_false`, `yes_no`, `rate`, or the prompt of a trained reranker if
    `backbone` is one (`qwen3_vl_reranker`, `lamra_rank`, `monoqwen2_vl`, `lychee_rerank_mm`); as the profile does if
    null, which is `mcq` by default."""
    instruction: str = ""
    """What the search is for, where the prompt of a trained reranker has a place for it; its own words if empty."""
    context_free: ContextFree | None = None
    """Subtract the margin of the pair with an empty `candidate`, so that thresholds mean the same over queries, or with
    an empty `query`, so that what the model says of a candidate whatever is asked no longer counts; twice the pairs
    for `query`, one more for each query for `candidate`."""
    depth: Annotated[int, Field(gt=0)] = 10
    """Coarse candidates that are scored."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Pairs per forward pass, and different images at a time."""
    enhancement: EnhancementConfig = EnhancementConfig()
    """Whether layers of the model look at the image again while a pair is scored."""
    backbone: BackboneConfig | None = None
    """Another model to score with, such as a trained reranker; the frozen one that embeds if null."""
    adaptive: AdaptiveDepth | None = None
    """How many fewer than `depth` are scored where coarse scores leave little to decide; none if null."""
    calibration: Path | None = None
    """What `slq rerank` has fitted to held-out queries (`calibration.json`), for probabilities and `fuse`."""
    fuse: bool = False
    """Rank by the sum of margin and weighted coarse score, with the weight of `calibration`."""
    deterministic: bool = False
    """One pair per pass, in `slq rerank` on one thread: the same bits whatever is scored beside a pair; slower."""
    run: Path | None = None
    """The run that `slq rerank` re-ranks, Parquet or TREC; `eval/run_slq.parquet` of the run folder if null."""
    shard_pairs: Annotated[int, Field(gt=0)] = 1024
    """Pairs per shard of `slq rerank`, the unit of retry and of commit. An image's pairs stand together."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of judged queries that `slq rerank` fits its calibration to; it reports on the others."""
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of pairs that cannot be scored above which `slq rerank` fails."""

    @property
    def question(self) -> str:
        """The framing that is used."""
        return self.framing or profile_by_name(self.profile).framing

    @model_validator(mode="after")
    def _fusion_has_a_weight(self) -> "RerankConfig":
        if self.fuse and self.calibration is None:
            raise ValueError(
                "fuse needs the weight of coarse scores from `calibration`; run `slq rerank` on held-out queries first"
            )
        if self.fuse and profile_by_name(self.profile).needs_vocabulary:
            raise ValueError(
                f"fuse adds coarse scores to margins, and profile {self.profile} does not order by them; use default"
            )
        return self


System = Literal["last_token", "untrained", "slq", "slq_fine", "slq_index"]
EMBED_AS_SLQ = ("slq_fine", "slq_index")
"""Systems that rank the vectors of `slq` in another way."""
VARIANT_MARK, LENGTH_MARK = ":", "@"
"""What stands between `slq` and the name of a variant, or the length of cut vectors, where systems are named."""


class EvalConfig(Section):
    """What is measured."""

    systems: tuple[System, ...] = ("last_token", "untrained", "slq", "slq_fine")
    """Zero-shot last token, zero-shot untrained latents, trained SLQ, and SLQ with the fine stage; `slq_index` ranks
    what SLQ embeds through the index that `slq index` has built. With SLQ its variants are measured too, as
    `slq:NAME`."""
    dimensions: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Shorter lengths to which SLQ's vectors are cut and measured again, as `slq@48`; see train.matryoshka."""
    ks: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (1, 5, 10)
    """Depths of hit@k and recall@k; those of a benchmark's own metrics are added."""
    metrics: tuple[str, ...] = ()
    """Further metrics beside those and mrr, such as `ndcg@10`, `map`, `precision@5` or `mrr@10`."""
    baseline: str | None = None
    """System that each other one is compared with in paired tests; null compares each with each."""
    same_images: Literal["apart", "together"] = "apart"
    """Whether items whose images are the same bytes (and whose texts are equal) all count as right where one is,
    `together`; published numbers count each item for itself, `apart`. How many there are is logged."""
    num_threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of each evaluation task; 0 leaves torch's default."""

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(parse_metric(name).name for name in names)
        except ConfigError as error:
            raise ValueError(str(error)) from None


class ResourcesConfig(Section):
    """What the stages may take from the cluster."""

    address: str | None = None
    """Ray address to join; None starts a local Ray for this command, unless RAY_ADDRESS is set."""
    train_workers: Annotated[int, Field(gt=0)] = 2
    embed_workers: Annotated[int, Field(gt=0)] = 1
    """Encoder actors."""
    rerank_workers: Annotated[int, Field(gt=0)] = 1
    """Scoring actors of `slq rerank`, and tasks of `slq retention` at a time."""
    prepare_workers: Annotated[int, Field(gt=0)] | None = None
    """Tasks that read, decode and tokenise beside them, one CPU each; as many as find a CPU if null."""
    index_workers: Annotated[int, Field(gt=0)] = 1
    """Tasks that build an index at once, one CPU each; 1 builds in the driver, with all cores of its machine. More than
    one must reach the index folder."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs of each training worker and encoder actor; fractions share a GPU between encoders."""
    gpus_per_index_worker: Annotated[float, Field(gt=0, le=1)] = 1
    """GPU of each index task where `index.device` is cuda, and of a service's index where `index.search_device` is;
    fractions share it. A task finds lists there and codes on its CPU meanwhile, so several keep a GPU busy."""
    index_partitions: Annotated[int, Field(gt=0)] = 1
    """Processes that hold the codes of a service's index, each a share of its files; with 1 the whole index is in one.
    All must reach the index folder."""


VARIANTS = "variants"


class StorageConfig(Section):
    """Where a run writes."""

    dir: Path = Path("runs/demo")
    """Run folder: `train/`, `adapter/`, `variants/`, `embeddings/`, `index/`, `eval/`, `rerank/`,
    `retention/`, `sweep/`, `karr/`, `serve/`."""
    embedding_dir: str | None = None
    """Where the embedding data set goes: a folder or `s3://bucket/prefix`; `dir`/embeddings if null. All workers must
    reach it."""
    rerank_dir: str | None = None
    """Where `slq rerank` writes: a folder or `s3://bucket/prefix`; `dir`/rerank if null. All workers must reach it."""
    karr_dir: Path | None = None
    """Folder that `slq karr` writes into; `dir`/karr if null. All workers must reach it."""
    retry_s: Annotated[float, Field(gt=0)] = 60.0
    """How long failures of an object store are tried again before the run ends; it can be resumed."""
    checkpoints: str | None = None
    """Where training checkpoints go: a folder or `s3://bucket/prefix`; `dir`/ray if null. All workers must reach it."""

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.dir / "adapter"

    def variant(self, name: str) -> Path:
        """A further adapter of the same training run."""
        return self.dir / VARIANTS / name

    @property
    def embeddings(self) -> str:
        """The embedding data set."""
        return self.embedding_dir or str(self.dir / "embeddings")

    @property
    def index(self) -> Path:
        """The index with its versions."""
        return self.dir / "index"

    @property
    def reranking(self) -> str:
        """What `slq rerank` writes."""
        return self.rerank_dir or str(self.dir / "rerank")

    @property
    def karr(self) -> Path:
        """What `slq karr` writes."""
        return self.karr_dir or self.dir / "karr"

    @property
    def evaluation(self) -> Path:
        """Results of `slq eval`."""
        return self.dir / "eval"

    @property
    def sweep(self) -> Path:
        """What `slq sweep` writes."""
        return self.dir / "sweep"


class Recipe(Section):
    """Every setting of a run."""

    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    mine: MineConfig = Field(default_factory=MineConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    index: IndexSettings = Field(default_factory=IndexSettings)
    rerank: RerankConfig = Field(default_factory=RerankConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    retention: RetentionConfig = Field(default_factory=RetentionConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    karr: KarrConfig = Field(default_factory=KarrConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)

    @property
    def index_place(self) -> IndexPlace:
        """Where the index is, in files of ours or in another engine."""
        return self.index.place(self.storage.index)

    @model_validator(mode="after")
    def _sharding_needs_the_same_passes(self) -> "Recipe":
        if self.train.negatives and self.train.zero_stage == 3:
            raise ValueError(
                "with train.zero_stage 3 all workers must make the same passes, and they would not for mined "
                "negatives, which captions share; use stage 2"
            )
        return self

    @model_validator(mode="after")
    def _variants_are_not_sharded(self) -> "Recipe":
        if self.adapter.variants and self.train.zero_stage != 0:
            raise ValueError(
                f"adapter.variants are clipped one by one, and train.zero_stage {self.train.zero_stage} leaves no "
                "worker a whole gradient; set it to 0, there is nothing to save on latent queries"
            )
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown (the nearest is named), or a value is wrong.
    """
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")], n=1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe {path} does not exist{hint}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold sections such as `train:`, not a {type(values).__name__}"
        )
    for override in overrides or []:
        _apply(values, override)
    recipe = Recipe.parse(values, source=path.name)
    assert isinstance(recipe, Recipe)
    return _with_absolute_folders(recipe)


def _with_absolute_folders(recipe: Recipe) -> Recipe:
    """Workers run in other directories than the command, so no path may depend on where it was given."""
    scorer = recipe.rerank.backbone
    caches = {name: getattr(recipe.train, name) for name in ("disk_cache", "vision_cache")}
    adapters = {key: path.resolve() for key, path in recipe.embed.adapters.items()}
    rerank: dict[str, Any] = {
        name: path and path.resolve()
        for name, path in (("run", recipe.rerank.run), ("calibration", recipe.rerank.calibration))
    }
    rerank["backbone"] = scorer and _with_absolute_name(scorer)
    sections = {
        "rerank": recipe.rerank.model_copy(update=rerank),
        "karr": _with_absolute_models(recipe.karr),
        "embed": recipe.embed.model_copy(update={"adapters": adapters}),
        "retention": recipe.retention.absolute(),
        "serve": _with_absolute_adapters(recipe.serve),
        "backbone": _with_absolute_name(recipe.backbone),
        "data": recipe.data.model_copy(update={"dir": recipe.data.dir.resolve()}),
        "index": recipe.index.model_copy(update={"target": _absolute(recipe.index.target)}),
        "storage": recipe.storage.model_copy(
            update={
                "dir": recipe.storage.dir.resolve(),
                "embedding_dir": _absolute(recipe.storage.embedding_dir),
                "rerank_dir": _absolute(recipe.storage.rerank_dir),
                "karr_dir": recipe.storage.karr_dir and recipe.storage.karr_dir.resolve(),
            }
        ),
        "train": recipe.train.model_copy(
            update={name: path and path.resolve() for name, path in caches.items()}
        ),
    }
    return recipe.model_copy(update=sections)


def _with_absolute_adapters(serve: ServeConfig) -> ServeConfig:
    root = serve.adapters_dir
    adapters = {name: path.resolve() for name, path in serve.adapters.items()}
    return serve.model_copy(update={"adapters": adapters, "adapters_dir": root and root.resolve()})


def _with_absolute_models(karr: KarrConfig) -> KarrConfig:
    def absolute(section: Any) -> Any:
        local = section.local and _with_absolute_name(section.local)
        return section.model_copy(update={"local": local})

    judges = tuple(map(absolute, karr.judges))
    return karr.model_copy(update={"rewriter": absolute(karr.rewriter), "judges": judges})


def _with_absolute_name(backbone: Named) -> Named:
    """A folder from the root on; a hub id is left as it is."""
    name = backbone.name
    if "/" in name and Path(name).is_dir():
        name = str(Path(name).resolve())
    return backbone.model_copy(update={"name": name})


def _absolute(place: str | None) -> str | None:
    """A folder or a file from the root on; addresses are so already."""
    return place if place is None or "://" in place else str(Path(place).resolve())


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None


def require_files(recipe: Recipe, *names: str) -> None:
    """Check that the data files a stage reads exist.

    Raises:
        ConfigError: One is missing; its recipe key is named.
    """
    for name in names:
        path = recipe.data.path(name)
        if name == "corpus" and "://" in recipe.data.corpus:
            continue  # opening it tells
        if not path.exists():
            hint = " (data.scenes would generate it)" if recipe.data.scenes is None else ""
            raise ConfigError(f"data.{name}: {path} does not exist{hint}")
