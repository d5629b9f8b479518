"""Numbers that papers report, to stand beside ours.

Values are in percent as printed, unless a metric says otherwise. R@k of these papers counts a query as right when one
right answer stands among the first k, which we call hit@k. Sources: tables 1 and 3 of SLQ's poster (ICML 2026, arXiv
2604.13710), its MMEB results, RetLLM (arXiv 2602.22278) as transcribed, and peers as cited there.
"""

from dataclasses import dataclass

COCO, FLICKR, MMEB = "COCO 5K", "Flickr30K 1K", "MMEB v1"
SHARE, URBAN, SUGAR = "ShareGPT4V-1k", "Urban1k", "SugarCrepe"
I2T, T2I, Q2C = "image -> text", "text -> image", "query -> candidates"
_TABLE_1, _TABLE_3 = "SLQ, poster, table 1", "SLQ, poster, table 3"
_SLQ, _RETLLM = "SLQ, arXiv 2604.13710", "RetLLM, arXiv 2602.22278, as transcribed"


@dataclass(frozen=True, slots=True)
class Published:
    """One number of a paper.

    Attributes:
        model: As the paper names it, with its method where it compares several.
        benchmark: The name in `Facts`, or of a benchmark of the model's other skills.
        direction: What looks for what, as in `Facts`; "" of what is no search.
        metric: As in our results; for groups of kinds `hit@1 GROUP`.
        value: In percent, or what the metric says.
        source: Paper and table.
    """

    model: str
    benchmark: str
    direction: str
    metric: str
    value: float
    source: str


# R@1/5/10: Flickr30K image -> text, text -> image, COCO image -> text, text -> image.
_RECALLS: tuple[tuple[str, str], ...] = (
    ("CLIP ViT-B", "77.8 95.0 98.2 58.8 83.3 89.8 51.0 74.9 83.5 30.5 56.0 66.8"),
    ("CLIP ViT-L", "87.2 98.3 99.4 67.3 89.0 93.3 58.1 81.0 87.8 37.0 61.6 71.5"),
    ("BLIP ViT-L", "75.5 95.1 97.7 70.0 91.2 95.2 63.5 86.5 92.5 48.4 74.4 83.2"),
    ("FLAME", "86.4 97.3 98.6 73.3 91.7 95.5 60.5 82.9 89.3 43.9 70.4 79.7"),
    ("E5-V-7B", "88.2 98.7 99.4 79.5 95.0 97.6 62.0 83.6 89.7 52.0 76.5 84.7"),
    ("TiGeR", "- - - 71.7 91.8 95.4 - - - 46.1 69.0 76.1"),
    ("VLM2VEC-7B", "94.6 99.5 99.8 80.3 95.0 97.4 68.5 88.4 93.4 49.2 73.8 83.3"),
    ("SLQ (InternVL3-1B)", "86.7 97.8 99.6 74.4 92.9 95.9 61.2 84.9 91.8 48.5 74.3 83.1"),
    ("SLQ (Qwen3-VL-2B)", "85.8 97.7 99.1 76.4 93.5 96.3 62.7 84.4 90.7 50.2 75.7 83.9"),
    ("SLQ (Qwen3-VL-4B)", "85.9 97.9 99.6 76.8 93.4 96.1 64.3 85.6 91.2 50.4 75.2 83.4"),
    ("SLQ (InternVL3-8B)", "92.0 99.4 99.8 81.8 95.1 97.6 69.6 89.1 93.8 55.4 79.7 86.8"),
)
_PLACES = [
    (benchmark, direction, f"hit@{k}")
    for benchmark in (FLICKR, COCO)
    for direction in (I2T, T2I)
    for k in (1, 5, 10)
]
# GPU hours (H800, five epochs of COCO), R@5 of Flickr30K text -> image and image -> text, of COCO the same, then MMMU,
# RealWorldQA and OCRBench of the tuned model.
_TUNING: tuple[tuple[str, str, str], ...] = (
    ("InternVL3-1B", "full fine-tuning", "18.0 90.8 94.8 72.4 84.2 40.7 54.3 758"),
    ("InternVL3-1B", "LoRA", "11.4 90.4 95.7 72.9 84.4 42.1 56.8 785"),
    ("InternVL3-1B", "SLQ", "3.9 92.9 97.8 74.3 84.9 43.4 58.2 790"),
    ("Qwen3-VL-2B", "full fine-tuning", "42.5 91.7 97.0 73.2 82.1 51.7 59.4 824"),
    ("Qwen3-VL-2B", "LoRA", "23.8 92.1 97.2 74.8 82.7 53.1 62.8 832"),
    ("Qwen3-VL-2B", "SLQ", "6.7 93.5 97.7 75.7 84.4 53.4 63.9 858"),
    ("Qwen3-VL-4B", "full fine-tuning", "96.2 92.0 97.2 74.5 82.8 63.8 66.7 851"),
    ("Qwen3-VL-4B", "LoRA", "48.6 92.7 96.8 75.1 83.7 65.4 68.3 857"),
    ("Qwen3-VL-4B", "SLQ", "13.5 93.4 97.9 75.2 85.6 67.4 70.9 881"),
    ("InternVL3-8B", "full fine-tuning", "403.8 94.0 96.6 78.2 87.4 59.8 66.5 847"),
    ("InternVL3-8B", "LoRA", "130.1 94.4 98.7 79.4 88.3 60.9 67.2 843"),
    ("InternVL3-8B", "SLQ", "38.9 95.1 99.4 79.7 89.1 62.7 70.8 880"),
)
_TUNED = [
    (COCO, "", "gpu_hours"),
    (FLICKR, T2I, "hit@5"),
    (FLICKR, I2T, "hit@5"),
    (COCO, T2I, "hit@5"),
    (COCO, I2T, "hit@5"),
    ("MMMU", "", "accuracy"),
    ("RealWorldQA", "", "accuracy"),
    ("OCRBench", "", "score"),
]
_RETLLM_7B = "RetLLM (Qwen2.5-VL-7B, CLIP ViT-L, k = 5)"
_RETLLM_LONG = "RetLLM (Qwen2.5-VL-7B, Long-CLIP, k = 5)"
_SINGLE: tuple[tuple[str, str, str, str, float, str], ...] = (
    ("SLQ (Qwen3-VL-4B)", MMEB, Q2C, "hit@1 all", 64.5, _SLQ),
    ("SLQ (InternVL3-8B)", MMEB, Q2C, "hit@1 all", 67.5, _SLQ),
    ("SigLIP So400m-384", COCO, T2I, "hit@1", 54.2, "as cited beside SLQ"),
    ("SigLIP So400m-384", COCO, I2T, "hit@1", 72.4, "as cited beside SLQ"),
    ("UniME-V2-7B", COCO, T2I, "hit@1", 60.9, "as cited beside SLQ"),
    ("UniME-V2-7B", COCO, I2T, "hit@1", 74.1, "as cited beside SLQ"),
    ("ReMatch-2B", COCO, T2I, "hit@1", 56.8, "as cited beside SLQ"),
    ("ReMatch-2B", COCO, I2T, "hit@1", 76.5, "as cited beside SLQ"),
    (_RETLLM_7B, FLICKR, I2T, "hit@1", 94.5, _RETLLM),
    (_RETLLM_7B, FLICKR, T2I, "hit@1", 82.0, _RETLLM),
    (_RETLLM_7B, COCO, I2T, "hit@1", 70.4, _RETLLM),
    (_RETLLM_7B, COCO, T2I, "hit@1", 54.1, _RETLLM),
    (_RETLLM_7B, SHARE, I2T, "hit@1", 97.6, _RETLLM),
    (_RETLLM_7B, SHARE, T2I, "hit@1", 94.2, _RETLLM),
    (_RETLLM_7B, URBAN, I2T, "hit@1", 88.9, _RETLLM),
    (_RETLLM_7B, URBAN, T2I, "hit@1", 78.6, _RETLLM),
    (_RETLLM_LONG, URBAN, I2T, "hit@1", 95.2, _RETLLM),
    (_RETLLM_LONG, URBAN, T2I, "hit@1", 95.8, _RETLLM),
    (_RETLLM_7B, SUGAR, I2T, "hit@1 replace", 94.8, _RETLLM),
    (_RETLLM_7B, SUGAR, I2T, "hit@1 swap", 92.7, _RETLLM),
    (_RETLLM_7B, SUGAR, I2T, "hit@1 add", 96.2, _RETLLM),
    (_RETLLM_7B, MMEB, Q2C, "hit@1 all", 54.2, _RETLLM),
    (_RETLLM_7B, MMEB, Q2C, "hit@1 classification", 60.3, _RETLLM),
    (_RETLLM_7B, MMEB, Q2C, "hit@1 VQA", 27.8, _RETLLM),
    (_RETLLM_7B, MMEB, Q2C, "hit@1 retrieval", 62.4, _RETLLM),
    (_RETLLM_7B, MMEB, Q2C, "hit@1 grounding", 60.2, _RETLLM),
    ("FreeRet (Qwen2.5-VL-7B, k = 10)", MMEB, Q2C, "hit@1 all", 67.8, "as cited beside RetLLM"),
    ("FreeRet (Qwen2.5-VL-7B, k = 50)", MMEB, Q2C, "hit@1 all", 70.7, "as cited beside RetLLM"),
)  # fmt: skip


def _all() -> tuple[Published, ...]:
    """Every number, once."""
    found = [
        Published(model, *place, float(value), _TABLE_1)
        for model, values in _RECALLS
        for place, value in zip(_PLACES, values.split(), strict=True)
        if value != "-"
    ]
    for backbone, method, values in _TUNING:
        for place, value in zip(_TUNED, values.split(), strict=True):
            # SLQ's own recalls stand in table 1 too
            if method != "SLQ" or not place[2].startswith("hit@"):
                model = f"{method} ({backbone})"
                found.append(Published(model, *place, float(value), _TABLE_3))
    return (*found, *(Published(*row) for row in _SINGLE))


PUBLISHED = _all()
"""Every number, in the order of the papers."""


def published(
    benchmark: str, direction: str, metric: str, *, model: str | None = None
) -> list[Published]:
    """Numbers of one cell of a results table.

    Args:
        benchmark: As in `Facts.name`.
        direction: Such as `text -> image`.
        metric: Such as `hit@1`; recall@k of one right answer is found under hit@k.
        model: Only of models whose name holds this, whatever the case; of all if None.
    """
    return [
        one
        for one in PUBLISHED
        if (one.benchmark, one.direction, one.metric) == (benchmark, direction, metric)
        and (model is None or model.lower() in one.model.lower())
    ]
