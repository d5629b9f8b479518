"""What an actor asks: the rewriter, judges, and whoever says whether a caption identifies its image."""

from dataclasses import dataclass, field

from pipelines.karr.endpoint import Endpoint
from pipelines.karr.identifying import CosineIdentifier, FineIdentifier, Identifier
from pipelines.karr.judges import ClueJudge, FrozenJudge, Judge, ModelJudge
from pipelines.karr.kept import KeptAnswers
from pipelines.karr.neighbours import Neighbours, image_places
from pipelines.karr.source import read_captions
from pipelines.loading import encoder_of, reranker_of, reranking_backbone, use_processors
from pipelines.recipe import Recipe
from pipelines.storage import Store
from slq.backbones import Backbone
from slq.karr.config import EndpointConfig, JudgeConfig, LocalConfig
from slq.karr.lexicon import Lexicon
from slq.karr.rewriting import ClueRewriter, LanguageModel, ModelRewriter, Rewriter
from slq.reranker import Reranker
from slq.scenes.sprites import Sprite, load_sprites


@dataclass
class Models:
    """All that an actor asks.

    Attributes:
        rewriter: Chooses and rewords.
        asked_whether_named: Asked, too, whether a caption names its target; None for nobody.
        judges: In the recipe's order.
        identifier: None where that is switched off.
        lexicon: Other names of targets.
        sprites: Whose clue table binds; None where captions are not of the shipped scenes.
        threads: Captions in hand at once.
        answers: Language models with what they have cost.
    """

    rewriter: Rewriter
    judges: list[Judge]
    lexicon: Lexicon
    asked_whether_named: LanguageModel | None = None
    identifier: Identifier | None = None
    sprites: dict[str, Sprite] | None = None
    threads: int = 1
    answers: list[KeptAnswers] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Answers `asked` and `kept` so far."""
        return {what: sum(one.counts[what] for one in self.answers) for what in ("asked", "kept")}


class _Loader:
    """Loads each model once, whoever uses it.

    Args:
        recipe: The resolved recipe.
        store: Of the run.
        workers: Actors that share an endpoint.
    """

    def __init__(self, recipe: Recipe, store: Store, workers: int) -> None:
        self._recipe, self._store, self._workers = recipe, store, workers
        self.answers: dict[str, KeptAnswers] = {}
        self._backbone: Backbone | None = None

    def language_model(self, config: EndpointConfig | LocalConfig) -> KeptAnswers:
        key = f"{type(config).__name__} {config.model_dump_json()}"
        if key not in self.answers:
            self.answers[key] = KeptAnswers(self._fresh(config), self._store)
        return self.answers[key]

    def _fresh(self, config: EndpointConfig | LocalConfig) -> LanguageModel:
        if isinstance(config, EndpointConfig):
            return Endpoint(config, workers=self._workers)
        from slq.karr.local_model import LocalModel

        return LocalModel(config)

    def reranker(self, framing: str | None) -> Reranker:
        self._backbone = self._backbone or reranking_backbone(self._recipe)
        section = self._recipe.rerank.model_copy(
            update={"framing": framing or self._recipe.rerank.framing}
        )
        return reranker_of(self._recipe.model_copy(update={"rerank": section}), self._backbone)

    def judge(self, config: JudgeConfig) -> Judge:
        if config.kind == "clues":
            return ClueJudge(config.name)
        if config.kind == "frozen":
            return FrozenJudge(config, self.reranker(config.framing))
        section = config.endpoint if config.kind == "endpoint" else config.local
        assert section is not None  # its validator has seen to it
        threads = config.endpoint.concurrency if config.endpoint else 1
        return ModelJudge(config, self.language_model(section), self._recipe.karr.seed, threads)

    def identifier(self) -> Identifier | None:
        section = self._recipe.karr.identify
        if section.by == "off":
            return None
        neighbours = Neighbours(self._store, section.neighbours)
        if section.by == "coarse":
            encoder = encoder_of(self._recipe, section.system)
            return CosineIdentifier(self._recipe, neighbours, encoder.encode_items)
        uris = image_places(read_captions(self._store))
        return FineIdentifier(self._recipe, neighbours, self.reranker(None), uris)


def load_models(recipe: Recipe, store: Store, workers: int) -> Models:
    """Load what a recipe asks.

    Args:
        recipe: The resolved recipe.
        store: Of the run.
        workers: Actors that share an endpoint's rate.

    Raises:
        ArtifactError: The adapter, or vectors of images, are missing.
        ConfigError: A model cannot be loaded, or a key is not set.
        HardwareError: A device is not there.
    """
    use_processors(recipe.eval.num_threads)
    section, loader = recipe.karr.rewriter, _Loader(recipe, store, workers)
    model = section.endpoint if section.kind == "endpoint" else section.local
    of_scenes = section.kind == "clues"
    rewriter: Rewriter = ClueRewriter(recipe.karr.seed)
    named = None
    if not of_scenes:
        assert model is not None
        asked = loader.language_model(model)
        rewriter = ModelRewriter(asked)
        named = asked if section.ask_whether_named else None
    threads = section.endpoint.concurrency if section.kind == "endpoint" and section.endpoint else 1
    found = Models(
        rewriter,
        [loader.judge(judge) for judge in recipe.karr.judges],
        Lexicon(recipe.karr.wordnet),
        asked_whether_named=named,
        identifier=loader.identifier(),
        sprites=load_sprites() if of_scenes or recipe.data.scenes is not None else None,
        threads=max(1, threads // workers),
    )
    found.answers = list(loader.answers.values())
    return found
