"""Answers of language models on disk, so that a run that goes on pays for none of them twice."""

import json
import threading
from collections import Counter
from typing import Any

from pipelines.storage import Store
from slq.karr.prompts import Message, prompt_hash
from slq.karr.rewriting import Completion, LanguageModel

ANSWERS = "answers"


class KeptAnswers:
    """Another model whose answers are kept by model and prompt; failures are not.

    Args:
        model: Who is asked where nothing is kept.
        store: Where answers lie, below `answers/`.

    Attributes:
        counts: `asked` and `kept` answers of this process.
    """

    def __init__(self, model: LanguageModel, store: Store) -> None:
        self._model, self._store = model, store
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()

    @property
    def name(self) -> str:
        """See `LanguageModel.name`."""
        return self._model.name

    def settings(self, seed: int) -> dict[str, Any]:
        """See `LanguageModel.settings`."""
        return self._model.settings(seed)

    def complete(self, chat: list[Message], seed: int) -> Completion:
        """See `LanguageModel.complete`."""
        key = prompt_hash(chat, self.settings(seed))
        name = f"{ANSWERS}/{key[:2]}/{key}.json"
        found = self._read(name, key)
        if found is None:
            found = self._model.complete(chat, seed)
            record = {"model": self.name, "prompt_hash": key, "text": found.text}
            data = json.dumps({**record, "answered": found.answered}).encode()
            self._store.write(name, data)
            self._count("asked")
        else:
            self._count("kept")
        return found

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1

    def _read(self, name: str, key: str) -> Completion | None:
        """A kept answer; None where there is none, or a damaged one."""
        try:
            record = json.loads(self._store.read(name))
            whole = record["prompt_hash"] == key and record["model"] == self.name
            found = Completion(str(record["text"]), key, str(record["answered"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None
