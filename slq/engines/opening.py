"""Engines by name, and where an index is, whichever holds it."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from slq.engines.arrays import Arrays
from slq.engines.base import Engine, SearchEngine
from slq.engines.lance import Lance
from slq.engines.milvus import Milvus
from slq.engines.qdrant import Qdrant
from slq.errors import ConfigError
from slq.index import SearchIndex, VectorIndex
from slq.index.canary import Encodes, require_canary, require_kept_canary
from slq.index.config import CPU

FAISS = "faiss"
SEARCH_ENGINES: dict[str, type[SearchEngine]] = {"lance": Lance, "milvus": Milvus, "qdrant": Qdrant}
ENGINES: dict[str, type[Engine]] = {"npy": Arrays, **SEARCH_ENGINES}


def engine(kind: str, target: str, name: str) -> Engine:
    """A place in an engine.

    Args:
        kind: One of `ENGINES`.
        target: Where.
        name: Of the collection there.

    Raises:
        ConfigError: There is no such engine, or the address cannot be.
    """
    if kind not in ENGINES:
        raise ConfigError(f"engine {kind!r} is unknown; choose one of {', '.join(ENGINES)}")
    problem = unfit_target(kind, target)
    if problem is not None:
        raise ConfigError(problem)
    return ENGINES[kind](target, name)


def unfit_target(kind: str, target: str) -> str | None:
    """Why an engine has no such place, told without what may be a secret; None where it has."""
    if "://" not in target:
        if kind == "milvus" and not target.endswith(".db"):
            return f"the name of a file of Milvus Lite ends in .db, and that of {target} does not"
        return None
    try:
        parts = urlsplit(target)
        has_secret = "@" in parts.netloc or bool(parts.query)
    except ValueError:
        has_secret = False
    if has_secret:
        known = ENGINES.get(kind)
        variables = (known and known.credentials) or "the environment of that engine"
        return (
            "an address holds no user, password or query: recipes and logs would show them; leave it out and set "
            f"{variables}"
        )
    return None


@dataclass(frozen=True)
class IndexPlace:
    """Where an index is, so small that any process can be told.

    Attributes:
        kind: `faiss`, or one of `SEARCH_ENGINES`.
        target: The index folder, or where the engine is.
        name: Of the collection there; nothing for faiss.
        folder: What a run keeps of its index: canaries of embedding spaces.
    """

    kind: str
    target: str
    name: str
    folder: Path

    @classmethod
    def of_folder(cls, folder: Path) -> "IndexPlace":
        """An index of faiss."""
        return cls(FAISS, str(folder), "", folder)

    def __str__(self) -> str:
        return self.target if self.kind == FAISS else f"{self.kind} {self.engine}"

    @property
    def engine(self) -> SearchEngine:
        """The place in an engine.

        Raises:
            ConfigError: It is no place in an engine.
        """
        found = engine(self.kind, self.target, self.name)
        if not isinstance(found, SearchEngine):
            raise ConfigError(f"{self.kind} answers no queries")
        return found

    def open(
        self, version: str | None = None, *, device: str = CPU, has_codes: bool = True
    ) -> SearchIndex:
        """Open the index.

        Args:
            version: That is asked for; the current one if None.
            device: Where an index of faiss is searched, as of `index.search_device`; other engines decide themselves.
            has_codes: Whether an index of faiss holds its codes itself.

        Raises:
            ArtifactError: There is no index, no such version, or it is damaged or unfinished.
            ConfigError: Something else is there, or a package is not installed.
            HardwareError: The device is not here, or has too little memory.
            StorageError: It cannot be reached, or another process holds what only one can.
        """
        if self.kind == FAISS:
            return VectorIndex(Path(self.target), version, device=device, has_codes=has_codes)
        return self.engine.open(version)

    def require_canary(self, version: str, fingerprint: str, encoder: Encodes) -> int:
        """Refuse an encoder that embeds the index's items otherwise than it did; see `slq.index.canary`.

        Args:
            version: Of the index.
            fingerprint: Of its embedding space.
            encoder: Is to embed queries.
        """
        if self.kind == FAISS:
            return require_canary(Path(self.target), version, encoder)
        return require_kept_canary(self.folder, fingerprint, encoder)
