"""What trained rerankers read: the prompts that they were trained on, and the two words that answer.

Each is a sequence of fixed words and of slots, in the order of the official messages. That is the format that the model
was trained on, so in three of them a candidate's text has the last word, and in the fourth the query's; our own
framings never allow that (`slq.reranking.layout`). Users' texts still come in one line, without control tokens and cut
to the backbone's `max_text_tokens`, and whatever they say, only the answer's two words are read.
"""

from dataclasses import dataclass
from enum import Enum


class Slot(Enum):
    """What stands between our words."""

    INSTRUCTION = "an instruction"
    QUERY_IMAGE = "an image in the query"
    QUERY_TEXT = "a text in the query"
    CANDIDATE_IMAGE = "an image in the candidate"
    CANDIDATE_TEXT = "a text in the candidate"


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt that a model was trained on.

    Attributes:
        name: Key of the framing.
        parts: Our words and slots, in order; of slots in brackets those that are filled are parted by a space. What a
            pair has no slot for is refused.
        labels: The answers that mean a match and none, each exactly one token: `margin` is the difference of their
            logits, and its sigmoid the official score.
        system: Message before the turn; None leaves the one that the model's chat template writes by itself.
        instruction: What stands in its slot if none is given.
        empty: What the official prompt says in place of a side that has nothing; ours where it says nothing.
    """

    name: str
    parts: tuple[str | tuple[Slot, ...], ...]
    labels: tuple[str, str]
    system: str | None = None
    instruction: str = ""
    empty: str | None = None

    @property
    def slots(self) -> set[Slot]:
        """All that there is a place for."""
        return {slot for part in self.parts if not isinstance(part, str) for slot in part}


_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCT_QUERY_DOCUMENT = (
    "<Instruct>: ", (Slot.INSTRUCTION,),
    "<Query>:", (Slot.QUERY_IMAGE,), (Slot.QUERY_TEXT,),
    "\n<Document>:", (Slot.CANDIDATE_IMAGE,), (Slot.CANDIDATE_TEXT,),
)  # fmt: skip

# Qwen/Qwen3-VL-Reranker-2B and -8B. From scripts/qwen3_vl_reranker.py of the model repositories (copies:
# mi-iro/PageElement, yannassoumou/multimodel_rag), and examples/pooling/score/template/qwen3_vl_reranker.jinja of
# vllm-project/vllm, which agree. Score: sigmoid of the hidden state times the difference of the rows of "yes" and "no".
_QWEN3_VL_RERANKER = Template(
    "qwen3_vl_reranker",
    _INSTRUCT_QUERY_DOCUMENT,
    ("yes", "no"),
    system=_JUDGE,
    instruction="Given a search query, retrieve relevant candidates that answer the query.",
    empty="NULL",
)

# vec-ai/lychee-rerank-mm (Qwen2.5-VL-7B, arXiv 2510.14824). Not confirmed by the model card, whose text we did not
# have: the prompt, its default instruction included, is that of one public script, which evaluates the model on images
# and texts of the MCMR benchmark. That the score is P("yes") over "yes" and "no" is the paper's formula.
_LYCHEE_RERANK_MM = Template(
    "lychee_rerank_mm",
    _INSTRUCT_QUERY_DOCUMENT,
    ("yes", "no"),
    system=_JUDGE,
    instruction="Given a web search query, retrieve relevant passages that answer the query",
)

# code-kunkun/LamRA-Rank (Qwen2-VL-7B; we did not see the code of its Qwen2.5-VL branch). From its training and
# evaluation, dataset/datasets_mbeir_rerank.py, dataset/datasets_mbeir_eval_rerank.py and
# eval/eval_mbeir_rerank_pointwise.py (copy: yuanzm1/lamra): P("Yes") over "Yes" and "No". The gap of 24 spaces comes
# from a string that goes on in an indented line; it and the misspelling are in the training data. There the instruction
# of M-BEIR's task stands before the query's text ("Find me an everyday image that matches the given caption."), so it
# should be given; texts begin with a capital and end with a full stop, which is left to the caller.
_LAMRA_RANK = Template(
    "lamra_rank",
    (
        "I will provide you with a query and a candidate. Please evaluate whether the candidate"
        + " " * 24
        + "meets the requirements of the query. If it does, respond with 'Yes'; "
        "if it doesn't, responed with 'No'.",
        "Query:", (Slot.QUERY_IMAGE,), (Slot.INSTRUCTION, Slot.QUERY_TEXT),
        "Candidate:", (Slot.CANDIDATE_IMAGE,), (Slot.CANDIDATE_TEXT,),
    ),
    ("Yes", "No"),
)  # fmt: skip

# lightonai/MonoQwen2-VL-v0.1 (LoRA on Qwen2-VL-2B, MonoT5's objective). From rerankers/models/monovlm_ranker.py of
# AnswerDotAI/rerankers; several repositories have the same words from its model card: P("True") over "True" and
# "False". It was trained on images of pages as candidates and texts as queries, and is asked nothing else.
_MONOQWEN2_VL = Template(
    "monoqwen2_vl",
    (
        (Slot.CANDIDATE_IMAGE,),
        "Assert the relevance of the previous image document to the following query, "
        "answer True or False. The query is: ",
        (Slot.QUERY_TEXT,),
    ),
    ("True", "False"),
)

TEMPLATES: tuple[Template, ...] = (
    _QWEN3_VL_RERANKER,
    _LAMRA_RANK,
    _MONOQWEN2_VL,
    _LYCHEE_RERANK_MM,
)
