"""What a run will cost: arithmetic on a sample of its work, and how that compares with what the run did cost."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.recipe import Recipe
from slq.errors import ArtifactError
from slq.files import read_json

log = logging.getLogger(__name__)
ESTIMATE = "estimate.json"
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What rows from all over the corpus cost.

    Attributes:
        rows: That were read, quarantined ones included; never 0.
        quarantined: Of these.
        input_bytes: Of their images and texts.
        tokens: Of the others' sequences.
        padded_tokens: Of their batches, padding included.
        prepare_s: Time to read, decode, tokenise and pack them, on one CPU.
        encode_s: Time of one encoder.
        write_s: Time to write pieces and a shard of them, on one CPU.
        written_bytes: Of that shard.
        known_rows: Of shards that were counted, where only reading them tells.
        known_bytes: Of those shards' files.
    """

    rows: int
    quarantined: int
    input_bytes: int
    tokens: int
    padded_tokens: int
    prepare_s: float
    encode_s: float
    write_s: float
    written_bytes: int
    known_rows: int = 0
    known_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be embedded, and by how many.

    Attributes:
        rows: Of the corpus; None where only reading it tells.
        shards: That it is cut into.
        file_bytes: Of its files.
        encoders: That are started.
        preparing_cpus: That read beside them.
        gpus_per_encoder: Of each.
    """

    rows: int | None
    shards: int
    file_bytes: int
    encoders: int
    preparing_cpus: int
    gpus_per_encoder: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will cost; the fields are those of `estimate.json`.

    Attributes:
        rows: Of the corpus, quarantined ones included.
        rows_are_estimated: Whether they are told by the size of its files.
        shards: That it is cut into.
        input_bytes: Of the corpus' files.
        item_bytes: Of the images and texts that are read; more than that where tables name files.
        output_bytes: Of the data set's shards.
        quarantined_share: Of the rows.
        padding_share: Of the batches' tokens.
        encoder_rows_per_s: Of one encoder that never waits.
        preparing_rows_per_s: Of one preparing CPU.
        encoders: That are started.
        preparing_cpus: That read beside them.
        preparing_cpus_needed: So many keep all encoders busy.
        encoder_hours: Of all encoders together.
        gpu_hours: Of their GPUs.
        cpu_hours: To prepare and to write.
        price_per_encoder_hour: As it was given.
        cost: Of the encoder hours.
        rows_per_s: Of the run.
        eta_s: Of the run, without its start.
        sampled_rows: That all this is told from.
        problems: What would keep the run from starting.
    """

    rows: int
    rows_are_estimated: bool
    shards: int
    input_bytes: int
    item_bytes: int
    output_bytes: int
    quarantined_share: float
    padding_share: float
    encoder_rows_per_s: float
    preparing_rows_per_s: float
    encoders: int
    preparing_cpus: int
    preparing_cpus_needed: int
    encoder_hours: float
    gpu_hours: float
    cpu_hours: float
    price_per_encoder_hour: float
    cost: float
    rows_per_s: float
    eta_s: float
    sampled_rows: int
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file, or for machines."""
        return asdict(self)


def estimate_of(sample: Sample, load: Workload, price: float) -> Estimate:
    """Extrapolate from a sample.

    Args:
        sample: What rows from all over the corpus cost.
        load: What is to be done.
        price: Of one encoder for one hour.
    """
    rows = load.rows if load.rows is not None else _rows_by_bytes(sample, load.file_bytes)
    share = sample.quarantined / sample.rows
    encode_s, cpu_s = (
        rows / sample.rows * seconds
        for seconds in (sample.encode_s, sample.prepare_s + sample.write_s)
    )
    eta_s = max(encode_s / load.encoders, cpu_s / load.preparing_cpus)
    encoder_hours = encode_s / _HOUR_S
    return Estimate(
        rows=rows,
        rows_are_estimated=load.rows is None,
        shards=load.shards,
        input_bytes=load.file_bytes,
        item_bytes=round(rows / sample.rows * sample.input_bytes),
        output_bytes=round(rows / sample.rows * sample.written_bytes),
        quarantined_share=share,
        padding_share=1 - sample.tokens / sample.padded_tokens if sample.padded_tokens else 0.0,
        encoder_rows_per_s=sample.rows / sample.encode_s,
        preparing_rows_per_s=sample.rows / sample.prepare_s,
        encoders=load.encoders,
        preparing_cpus=load.preparing_cpus,
        preparing_cpus_needed=math.ceil(load.encoders * sample.prepare_s / sample.encode_s),
        encoder_hours=encoder_hours,
        gpu_hours=encoder_hours * load.gpus_per_encoder,
        cpu_hours=cpu_s / _HOUR_S,
        price_per_encoder_hour=price,
        cost=encoder_hours * price,
        rows_per_s=rows / eta_s,
        eta_s=eta_s,
        sampled_rows=sample.rows,
    )


def _rows_by_bytes(sample: Sample, file_bytes: int) -> int:
    return max(1, round(sample.known_rows / sample.known_bytes * file_bytes))


def subject(recipe: Recipe, fingerprint: str) -> dict[str, str]:
    """What an estimate is about; with a run of anything else it has nothing to do."""
    return {"corpus": recipe.data.corpus_location, "fingerprint": fingerprint}


def with_estimate(
    report: dict[str, Any], recipe: Recipe, fingerprint: str, output_bytes: int
) -> dict[str, Any]:
    """A run's report with what `slq plan` had said of it, if it had; the log tells both.

    Args:
        report: As `Totals.report` gives it.
        recipe: Of the run.
        fingerprint: Of its adapter.
        output_bytes: Of the shards of the whole data set.
    """
    try:
        estimate = read_json(recipe.storage.dir / ESTIMATE)
    except ArtifactError:
        return report
    about = subject(recipe, fingerprint)
    if not report["rows"] or {name: estimate.get(name) for name in about} != about:
        return report
    found = comparison(estimate, report, output_bytes)
    for name, (planned, actual) in found.items():
        log.info("%s: %.4g were planned, %.4g came", name, planned, actual)
    return report | {"planned": {name: planned for name, (planned, _) in found.items()}}


def comparison(
    estimate: Mapping[str, Any], report: Mapping[str, Any], output_bytes: int
) -> dict[str, tuple[float, float]]:
    """What was planned and what came of it.

    Args:
        estimate: As `Estimate.to_json` gave it.
        report: Of the run, as `Totals.report` gives it.
        output_bytes: Of the shards of the whole data set.

    Returns:
        Name -> planned and actual; hours are those of the rows of this run.
    """
    hours = report["rows"] / estimate["rows_per_s"] / _HOUR_S
    share = report["quarantined"] / max(1, report["rows"])
    return {
        "rows_per_s": (estimate["rows_per_s"], report["rows_per_s"]),
        "hours": (hours, report["seconds"] / _HOUR_S),
        "output_bytes": (estimate["output_bytes"], output_bytes),
        "quarantined_share": (estimate["quarantined_share"], share),
    }
