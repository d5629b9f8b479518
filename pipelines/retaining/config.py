"""What is asked of a backbone to see which of its abilities training has left."""

from typing import Annotated

from pydantic import Field

from slq.benchmarks.mmmu import MmmuConfig
from slq.benchmarks.ocrbench import OcrBenchConfig
from slq.benchmarks.questions import QuestionSet
from slq.benchmarks.realworldqa import RealWorldQaConfig
from slq.config import Section

SETS = ("mmmu", "realworldqa", "ocrbench")


class RetentionConfig(Section):
    """The abilities that `slq retention` measures, without and with an adapter loaded."""

    mmmu: MmmuConfig | None = None
    """Questions of 30 college subjects, with one to seven images."""
    realworldqa: RealWorldQaConfig | None = None
    """Questions about photographs."""
    ocrbench: OcrBenchConfig | None = None
    """Questions about text in images."""
    scenes: Annotated[int, Field(ge=0)] = 0
    """Held-out scenes that are captioned and matched, by a backbone that `slq pretrain` made only; 0 asks nothing."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Questions per pass."""
    part_questions: Annotated[int, Field(gt=0)] = 64
    """Questions per task. Each loads the model anew, so a large model wants more."""
    num_threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of each task; 0 leaves torch's default."""

    @property
    def sets(self) -> dict[str, QuestionSet]:
        """The benchmarks that are named, by key."""
        return {name: found for name in SETS if (found := getattr(self, name)) is not None}

    def absolute(self) -> "RetentionConfig":
        """The same with folders from the root on."""
        places = {
            name: getattr(self, name).model_copy(update={"dir": found.dir.resolve()})
            for name, found in self.sets.items()
        }
        return self.model_copy(update=places)
