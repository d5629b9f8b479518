"""Published numbers: found by cell, each once, and of benchmarks that we can measure."""

from collections import Counter

import pytest

from slq.benchmarks.karpathy import KarpathyConfig
from slq.benchmarks.long_captions import ShareGpt4vConfig, Urban1kConfig
from slq.benchmarks.mmeb_eval import MmebEvalConfig
from slq.benchmarks.published import I2T, PUBLISHED, T2I, published
from slq.benchmarks.sugar_crepe import SugarCrepeConfig


@pytest.mark.parametrize(
    ("benchmark", "direction", "metric", "model", "value"),
    [
        ("COCO 5K", T2I, "hit@1", "SLQ (InternVL3-1B)", 48.5),
        ("COCO 5K", I2T, "hit@10", "SLQ (InternVL3-8B)", 93.8),
        ("Flickr30K 1K", I2T, "hit@1", "SLQ (Qwen3-VL-2B)", 85.8),
        ("Flickr30K 1K", T2I, "hit@5", "LoRA (Qwen3-VL-4B)", 92.7),
        ("COCO 5K", I2T, "hit@5", "full fine-tuning (InternVL3-8B)", 87.4),
        ("COCO 5K", "", "gpu_hours", "SLQ (InternVL3-1B)", 3.9),
        ("OCRBench", "", "score", "SLQ (Qwen3-VL-4B)", 881),
        ("MMEB v1", "query -> candidates", "hit@1 all", "SLQ (InternVL3-8B)", 67.5),
        ("MMEB v1", "query -> candidates", "hit@1 VQA", "RetLLM", 27.8),
        ("SugarCrepe", I2T, "hit@1 swap", "retllm", 92.7),
    ],
)
def test_a_number_is_found_by_its_cell(
    benchmark: str, direction: str, metric: str, model: str, value: float
) -> None:
    (found,) = published(benchmark, direction, metric, model=model)
    assert found.value == value
    assert found.source


def test_a_missing_number_is_none_and_no_number_stands_twice() -> None:
    assert published("Flickr30K 1K", I2T, "hit@1", model="TiGeR") == []
    assert published("COCO 5K", T2I, "hit@2") == []
    cells = Counter((p.model, p.benchmark, p.direction, p.metric) for p in PUBLISHED)
    assert max(cells.values()) == 1
    assert all(0 < one.value <= 100 for one in PUBLISHED if one.metric.startswith("hit@"))


def test_hits_grow_with_the_depth() -> None:
    for one in PUBLISHED:
        if one.metric == "hit@1":
            deeper = published(one.benchmark, one.direction, "hit@5", model=one.model)
            assert all(other.value > one.value for other in deeper)


def test_names_are_those_of_our_benchmarks() -> None:
    configs = (
        KarpathyConfig(),
        KarpathyConfig.model_validate({"annotations": "dataset_flickr30k.json"}),
        MmebEvalConfig(format="mmeb_eval"),
        ShareGpt4vConfig(format="sharegpt4v"),
        SugarCrepeConfig(format="sugar_crepe"),
        Urban1kConfig(format="urban1k"),
    )
    ours = {config.facts().name for config in configs}
    others = {"MMMU", "RealWorldQA", "OCRBench"}
    assert {one.benchmark for one in PUBLISHED} == ours | others


def test_directions_and_groups_are_those_of_our_benchmarks() -> None:
    for config in (MmebEvalConfig(format="mmeb_eval"), SugarCrepeConfig(format="sugar_crepe")):
        facts = config.facts()
        for one in PUBLISHED:
            if one.benchmark == facts.name:
                metric, _, group = one.metric.partition(" ")
                assert (one.direction, metric) == (facts.direction, "hit@1")
                assert group in facts.published_groups


def test_only_what_papers_measured_is_published() -> None:
    assert Urban1kConfig(format="urban1k").facts().is_published
    assert not Urban1kConfig(format="urban1k", expected={}).facts().is_published
    assert ShareGpt4vConfig(format="sharegpt4v").facts().is_published
    assert not ShareGpt4vConfig(format="sharegpt4v", first=100).facts().is_published
    other = KarpathyConfig.model_validate({"annotations": "dataset_mine.json"})
    assert not other.facts().is_published
