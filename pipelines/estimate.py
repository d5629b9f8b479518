"""What an embedding run will cost, told before it is started from a minute of its own work."""

import tempfile
from pathlib import Path

from pipelines.corpus import Shard, corpus_of, read_plan, write_plan
from pipelines.embedding.calibration import sample_shards
from pipelines.embedding.costs import (
    ESTIMATE,
    Estimate,
    Sample,
    Workload,
    estimate_of,
    subject,
)
from pipelines.embedding.flow import MODELS, PLAN, Flow
from pipelines.embedding.models import adapter_configs, new_flow
from pipelines.embedding.preflight import require_room, workers_for
from pipelines.embedding.sampling import sampled
from pipelines.failures import FAILURE, raise_failure
from pipelines.progress import show
from pipelines.recipe import Recipe
from pipelines.storage import open_store
from pipelines.tasks import collect, model_task
from slq.errors import ConfigError, HardwareError
from slq.files import write_json


def estimate(
    recipe: Recipe, *, seconds: float = 60.0, price: float = 2.5, models: str = MODELS
) -> Estimate:
    """Plan a run, and measure a sample of it. Runs inside Ray; nothing is written into the data set.

    Args:
        recipe: The resolved recipe.
        seconds: How long to measure, about; planning and loading come on top.
        price: Of one encoder for one hour.
        models: The module that gives the models.

    Returns:
        What the run will cost; it is also stored as `estimate.json` in the run folder.

    Raises:
        ArtifactError: There is no adapter yet.
        ConfigError: The corpus is not there, or of no known format.
        DataError: No item of the sample can be embedded.
        StorageError: The corpus cannot be read.
    """
    configs = adapter_configs(recipe)
    corpus = corpus_of(recipe)
    with tempfile.TemporaryDirectory(prefix="slq-plan-") as folder:
        summary = write_plan(corpus.shards(recipe.embed.shard_rows), Path(folder) / PLAN)
        plan = read_plan(open_store(folder), PLAN)
        chosen = [plan.shard(shard_id) for shard_id in sample_shards(len(plan))]
    sample = _sample(new_flow(recipe, configs, models), chosen, seconds)
    workers = workers_for(recipe, summary.num_rows, summary.num_shards)
    resources = recipe.resources.model_copy(update={"embed_workers": workers})
    started = recipe.model_copy(update={"resources": resources})
    load = Workload(
        rows=summary.num_rows,
        shards=summary.num_shards,
        file_bytes=sum(file.size for file in corpus.files()),
        encoders=workers,
        preparing_cpus=_preparing_cpus(started),
        gpus_per_encoder=recipe.resources.gpus_per_worker,
    )
    found = estimate_of(sample, load, price)
    found.problems.extend(_problems(started))
    about = subject(recipe, configs[0].fingerprint)
    recipe.storage.dir.mkdir(parents=True, exist_ok=True)
    write_json(recipe.storage.dir / ESTIMATE, {**about, **found.to_json()})
    return found


def _sample(flow: Flow, shards: list[Shard], seconds: float) -> Sample:
    """The sample, measured by a worker that has what an encoder has.

    Raises:
        SlqError: As the worker raised it.
    """
    show(f"plan: measuring {seconds:.0f} s of work on rows of {len(shards)} shards")
    task = model_task(sampled, flow.recipe.resources.gpus_per_worker)
    (found,) = collect([task.remote(flow, shards, seconds)], "plan: sample")
    if isinstance(found, str):
        raise_failure({FAILURE: found})
    sample: Sample = found
    return sample


def _preparing_cpus(recipe: Recipe) -> int:
    """CPUs for reading beside the encoders: as many as the recipe says, or as the cluster has left."""
    import ray

    resources = recipe.resources
    if resources.prepare_workers:
        return resources.prepare_workers
    encoding = 0 if resources.gpus_per_worker else resources.embed_workers
    return max(1, int(ray.cluster_resources().get("CPU", 1)) - encoding)


def _problems(recipe: Recipe) -> list[str]:
    """What `slq embed` would refuse on this cluster. The plan may be for another one, so it is no error here."""
    import ray

    try:
        require_room(recipe, ray.cluster_resources(), len(ray.nodes()))
    except (ConfigError, HardwareError) as error:
        return [str(error)]
    return []
