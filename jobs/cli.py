"""The `slq` command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from jobs import diffing, piloting, sweeping
from jobs.console import (
    AsJson,
    DryRun,
    Overrides,
    RecipePath,
    command_line,
    err,
    friendly_errors,
    out,
    print_serve_config,
    run_stage,
)
from jobs.headlines import headline_table
from jobs.karr import karr
from jobs.keys import app as keys_app
from jobs.results import results_table
from jobs.retaining import EXAMPLE as RETENTION_EXAMPLE
from jobs.retaining import retention
from pipelines.progress import duration
from pipelines.recipe import Recipe

app = typer.Typer(
    name="slq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a frozen multimodal LLM into a retriever, and serve it.",
    epilog="Start with: slq demo",
)
app.add_typer(keys_app)
app.command(epilog=diffing.EXAMPLE)(diffing.diff)
app.command(epilog=piloting.EXAMPLE)(piloting.pilot)
app.command(epilog=sweeping.EXAMPLE)(sweeping.sweep)
app.command(epilog="Example: slq karr jobs/recipes/karr.yaml --set karr.seed=1")(karr)
DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


@app.command(epilog="Example: slq train jobs/recipes/demo.yaml --set train.num_steps=50")
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train latent queries, LoRA or the whole model on Ray Train with DeepSpeed; run it again to resume."""
    from jobs.report.training_plot import write_training_plot
    from pipelines.train import train as fit
    from pipelines.training_log import HISTORY

    def stage(resolved: Recipe) -> Path:
        adapter = fit(resolved)
        folder = resolved.storage.dir / "train"
        picture = write_training_plot(folder / HISTORY, folder / "training.png")
        err.print(f"training curves: {picture}", highlight=False, soft_wrap=True)
        return adapter

    def plan(resolved: Recipe) -> dict[str, Any]:
        from pipelines.engine import trains_in_bf16
        from slq.training import deepspeed_config

        workers = resolved.resources.train_workers
        bf16 = trains_in_bf16(resolved)
        clip = not resolved.adapter.variants
        return {"deepspeed": deepspeed_config(resolved.train, workers, bf16=bf16, clip=clip)}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


@app.command(epilog="Example: slq mine jobs/recipes/demo.yaml --set mine.margins=true")
def mine(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Find hard negatives of the training pairs with the trained adapter; --json says how many."""
    from pipelines.mine import mine as stage
    from pipelines.mine import plan as facts

    def plan(resolved: Recipe) -> dict[str, Any]:
        return {"plan": facts(resolved)}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


@app.command(epilog="Example: slq embed jobs/recipes/demo.yaml")
def embed(
    recipe: RecipePath,
    overrides: Overrides = None,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="embed the quarantined rows again, and only those"),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Embed a corpus into Parquet shards on Ray Data; run it again to finish what is missing."""
    from functools import partial

    from pipelines.embed import embed as run

    stage = partial(run, retry_errors=retry_errors)

    def plan(resolved: Recipe) -> dict[str, Any]:
        from pipelines.corpus import corpus_of, summarise
        from pipelines.recipe import require_files

        scenes = resolved.data.scenes
        if scenes is not None and not resolved.data.path("corpus").exists():
            rows = scenes.test + scenes.unseen
            shards_needed = -(-rows // resolved.embed.shard_rows)
            return {"plan": {"shards": shards_needed, "rows": rows, "corpus": "generated first"}}
        made = resolved.data.karpathy or resolved.data.benchmark
        if made is not None and not resolved.data.path("corpus").exists():
            return {"plan": {"corpus": "generated first"}}  # how many images only its source knows
        require_files(resolved, "corpus")
        planned = summarise(corpus_of(resolved).shards(resolved.embed.shard_rows))
        return {"plan": {"shards": planned.num_shards, "rows": planned.num_rows}}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


@app.command(epilog="Example: slq plan jobs/recipes/hub.yaml --seconds 60 --price 2.50")
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="how long to measure; loading comes on top")
    ] = 60,
    price: Annotated[float, typer.Option(min=0, help="of one encoder (GPU) for one hour")] = 2.5,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Tell what `slq embed` will cost, from a minute of its own work: hours, bytes, shards, workers, ETA."""
    from jobs.planning import estimate_table
    from pipelines.estimate import estimate

    def stage(resolved: Recipe) -> dict[str, Any]:
        found = estimate(resolved, seconds=seconds, price=price)
        if not as_json:
            out.print(estimate_table(found))
            for problem in found.problems:
                out.print(f"[red]problem:[/] {escape(problem)}", highlight=False, soft_wrap=True)
        return found.to_json()

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage)


@app.command(epilog="Example: slq verify runs/demo/embeddings --sample 100")
def verify(
    location: Annotated[
        str, typer.Argument(help="an embedding data set: a folder or s3://bucket/prefix")
    ],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="adapter that made it (repeatable); the manifest's by default"),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="items embedded anew and compared; 0 needs no adapter")
    ] = 32,
    device: Annotated[str, typer.Option(help="where they are embedded: cpu or cuda")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check an embedding data set: hashes, counts, columns, rows, vectors, ids, and a sample embedded anew."""
    from jobs.verifying import checked, checks_table, finding_lines
    from slq import log

    log.configure()
    with friendly_errors():
        report = checked(location, adapter or (), sample, device)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        out.print(checks_table(report))
        for line in (*finding_lines(report.findings), *map(escape, report.notes)):
            out.print(line, highlight=False, soft_wrap=True)
    if not report.is_sound:
        raise typer.Exit(1)


@app.command(epilog="Example: slq index jobs/recipes/demo.yaml --set index.kind=ivf")
def index(
    recipe: RecipePath,
    overrides: Overrides = None,
    append: Annotated[
        str | None, typer.Option(help="add the rows of this further embedding data set")
    ] = None,
    delete: Annotated[
        Path | None, typer.Option(help="remove the items whose ids stand in this file, one a line")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="make one segment of all, without deleted items")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Publish a new index version: built from an embedding data set, or the current one changed."""
    from jobs.indexing import change_of

    with friendly_errors():
        stage = change_of(append, delete, compact=compact)
    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage)


@app.command(epilog="Example: slq versions runs/demo/index --rollback previous")
def versions(
    index_dir: Annotated[Path, typer.Argument(help="an index folder")],
    rollback: Annotated[
        str | None, typer.Option(help="make this version the current one; or: previous")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="remove all but so many of the newest")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the versions of an index, go back to one, remove old ones. A running service stays at its own."""
    from jobs.indexing import changed_versions, versions_table

    with friendly_errors():
        found = changed_versions(index_dir, rollback, keep)
    if as_json:
        print(json.dumps(found))
    else:
        out.print(versions_table(found))


@app.command(
    epilog="Example: slq export jobs/recipes/corpus.yaml --to lance --target s3://my-bucket/lance --name corpus"
)
def export(
    recipe: RecipePath,
    to: Annotated[str, typer.Option(help="npy, lance, milvus or qdrant")],
    target: Annotated[str, typer.Option(help="a folder, a file, or an address of that engine")],
    name: Annotated[str, typer.Option(help="of the folder, table or collection there")] = "slq",
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Hand an embedding data set over to another engine, streaming from its shards."""
    from pipelines.export import export as hand_over
    from slq.engines import engine

    with friendly_errors():
        place = engine(to, target, name)

    def stage(resolved: Recipe) -> dict[str, Any]:
        storage = resolved.storage
        rows = hand_over(storage.embeddings, place, retry_s=storage.retry_s)
        if not as_json:
            out.print(f"{rows:,} rows are in {name} of {target}", soft_wrap=True)
        return {"rows": rows}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage)


@app.command(
    epilog="Example: slq rerank jobs/recipes/demo.yaml --set rerank.run=bm25.trec --set rerank.depth=20"
)
def rerank(
    recipe: RecipePath,
    overrides: Overrides = None,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="score shards again with pairs that could not be"),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Re-rank a whole run with the fine stage on Ray Data; run it again to finish what is missing."""
    from jobs.reranking import draw, rerank_table, summary_lines
    from pipelines.rerank import plan as facts
    from pipelines.rerank import rerank as run

    def stage(resolved: Recipe) -> dict[str, Any]:
        result = run(resolved, retry_errors=retry_errors)
        picture = draw(result)
        if not as_json:
            if result.get("judged"):
                out.print(rerank_table(result))
            for line in summary_lines(result):
                out.print(line, markup=False, highlight=False, soft_wrap=True)
            if picture:
                out.print(f"picture: {picture}", highlight=False, soft_wrap=True)
            out.print(f"run: {result['run']}", highlight=False, soft_wrap=True)
        return result

    def plan(resolved: Recipe) -> dict[str, Any]:
        return {"plan": facts(resolved)}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


@app.command(
    "eval", epilog="Example: slq eval jobs/recipes/demo.yaml --set 'eval.metrics=[ndcg@10]'"
)
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure zero-shot, untrained, trained and re-ranked search: metrics with intervals, and paired tests.

    Writes results.json, results.md, and of each system a run in Parquet and in TREC's format.
    """
    from jobs.report.evaluation import write_markdown
    from pipelines.evaluate import evaluate as measure

    def stage(resolved: Recipe) -> dict[str, Any]:
        results = measure(resolved, command=command_line())
        told = write_markdown(resolved.storage.evaluation, results)
        if not as_json:
            out.print(results_table(results))
            if (headlines := headline_table(results)) is not None:
                out.print(headlines)
            out.print(f"all figures: {told}", highlight=False, soft_wrap=True)
        return results

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage)


@app.command(
    epilog="Example: slq score runs/demo/eval/run_slq_fine.trec runs/demo/eval/run_slq.trec "
    "--qrels runs/demo/eval/qrels.trec --metrics hit@1,ndcg@10"
)
def score(
    run: Annotated[
        Path, typer.Argument(help="a run: Parquet, or TREC's six columns (.trec, .run, .txt)")
    ],
    other: Annotated[
        Path | None, typer.Argument(help="a second run, compared with the first")
    ] = None,
    qrels: Annotated[
        Path | None,
        typer.Option(help="relevance: Parquet (query_id, item_id, grade), or TREC's four columns"),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="names, with commas: hit@k, recall@k, precision@k, mrr, map, ndcg@k")
    ] = "hit@1,hit@5,hit@10,recall@10,mrr,map,ndcg@10",
    as_json: AsJson = False,
) -> None:
    """Score any run by any relevance, with intervals; two runs are compared by a paired test.

    Equal scores count against a run, and queries that it lacks count 0.
    """
    from jobs.scoring import notes_of, score_table, scored

    with friendly_errors():
        found = scored([run] if other is None else [run, other], qrels, metrics)
    if as_json:
        print(json.dumps(found))
        return
    out.print(score_table(found))
    for note in notes_of(found):
        out.print(note, markup=False, highlight=False, soft_wrap=True)


app.command(epilog=RETENTION_EXAMPLE)(retention)


@app.command(epilog="Example: slq serve jobs/recipes/demo.yaml --set serve.port=8080")
def serve(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    config: Annotated[
        bool,
        typer.Option(
            "--config",
            help="print the same service as a Serve config (`serve deploy`, serveConfigV2 of a RayService) and stop",
        ),
    ] = False,
) -> None:
    """Serve search, embeddings and a gallery page on Ray Serve until interrupted."""
    from pipelines.serve import serve_until_stopped

    if config:
        print_serve_config(recipe, overrides)
        return
    run_stage(recipe, overrides, dry_run=dry_run, as_json=False, stage=serve_until_stopped)


@app.command(epilog='Example: slq search "two foxes left of a pencil" --url http://127.0.0.1:8000')
def search(  # noqa: PLR0913 - the options of a command line
    text: Annotated[str, typer.Argument(help="what to look for")] = "",
    image: Annotated[
        Path | None, typer.Option(help="an image to look for, alone or with the text")
    ] = None,
    url: Annotated[str | None, typer.Option(help="a running service")] = None,
    index_dir: Annotated[
        Path | None, typer.Option("--index", help="an index folder to search without a service")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="a recipe whose index to search without a service, in whichever engine"),
    ] = None,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="adapter folder; the recipe's or the index folder's neighbour if none"),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="results")] = 5,
    mode: Annotated[str, typer.Option(help="auto, coarse or fine")] = "auto",
    where: Annotated[
        str | None, typer.Option(help="without --url: predicate over stored columns, in SQL")
    ] = None,
    like: Annotated[str | None, typer.Option(help="look for items like the one of this id")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="without --url: an id to leave out (repeatable)")
    ] = None,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="without --url: of equal items only the first")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="without --url: compare with every vector")
    ] = False,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="without --url: rank by the text's words too")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search a running service, or an index directly."""
    from jobs.searching import Place, Question, answer, hits_table, named_recipe

    question = Question(text or None, image, like)
    options: dict[str, Any] = {"where": where, "exclude": exclude or [], "distinct": distinct}
    options |= {"exact": exact, "words": [text] if hybrid else None}
    with friendly_errors():
        place = Place(url, index_dir, named_recipe(recipe, overrides), adapter)
        found = answer(place, question, top_k=top_k, mode=mode, **options)
    if as_json:
        print(json.dumps(found))
    else:
        out.print(hits_table(found))


@app.command(epilog="Example: slq demo --out runs/demo")
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="where everything is written")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train, embed, index, evaluate, serve and query on the shipped scenes; writes report.html."""
    from jobs.demo import demo_recipe, run_demo
    from slq import log

    log.configure()
    with friendly_errors():
        recipe = demo_recipe(DEMO_RECIPE, out_dir, overrides)
        if dry_run:
            out.print_json(recipe.model_dump_json())
            return
        run_demo(recipe)


@app.command(epilog="Example: slq compare jobs/recipes/studies/methods.yaml --out runs/methods")
def compare(
    study: Annotated[
        Path, typer.Argument(help="YAML study, for example jobs/recipes/studies/methods.yaml")
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", help="the runs' folders, study.json, study.md and study.png")
    ],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train and measure variants of one recipe alike, in one table; run it again to finish what is missing."""
    import yaml

    from jobs.compare import compare as run
    from jobs.compare import outline, plan_study, study_table
    from slq import log

    log.configure()
    with friendly_errors():
        plan = plan_study(study, out_dir, overrides)
        if dry_run:
            shown = outline(plan)
            print(
                json.dumps(shown, indent=2)
                if as_json
                else yaml.safe_dump(shown, sort_keys=False, width=1000)
            )
            return
        summary = run(plan)
    if as_json:
        print(json.dumps(summary))
        return
    out.print(study_table(summary))
    for note in summary["notes"]:
        out.print(note, markup=False, highlight=False, soft_wrap=True)
    out.print(f"[green]done[/] {out_dir}", soft_wrap=True)


@app.command(epilog="Example: slq pretrain jobs/recipes/pretrain_tiny.yaml --out runs/tiny")
def pretrain(
    recipe: RecipePath,
    out_dir: Annotated[
        Path, typer.Option("--out", help="checkpoints, log and the finished model")
    ] = Path("runs/tiny"),
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's default")] = 0,
    evaluate: Annotated[
        str | None,
        typer.Option(help="train nothing: a backbone's held-out accuracies; `tiny` or a folder"),
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="with --evaluate: test scenes")] = 384,
    dry_run: DryRun = False,
) -> None:
    """Train the shipped tiny backbone from scratch; run it again to resume."""
    import torch
    import yaml

    from slq.errors import ConfigError
    from slq.pretraining.config import PretrainConfig
    from slq.pretraining.evaluation import accuracies_of
    from slq.pretraining.loop import pretrain as stage

    with friendly_errors():
        if not recipe.is_file():
            raise ConfigError(f"recipe {recipe} does not exist")
        config = PretrainConfig.parse(yaml.safe_load(recipe.read_text()) or {}, source=recipe.name)
        assert isinstance(config, PretrainConfig)
        if dry_run:
            out.print_json(config.model_dump_json())
            return
        if threads:
            torch.set_num_threads(threads)
        if evaluate is not None:
            out.print_json(data=accuracies_of(evaluate, config, num_scenes=scenes))
            return
        folder = stage(
            config, out_dir, lambda metrics: err.print(pretrain_line(metrics, config.num_steps))
        )
    out.print(f"[green]done[/] {folder}")


@app.command(epilog="Example: slq doctor")
def doctor() -> None:
    """Show versions, CPUs, GPUs, memory and limits that matter, and say what is wrong."""
    from jobs.doctor import report

    problems = report()
    if problems:
        raise typer.Exit(1)


@app.command(
    epilog="Example: slq bench train --family internvl --repeats 7",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="train, embed, index, rerank, serve, ablations, injection or chaos"),
    ],
) -> None:
    """Measure fast paths against slow ones, the service under load, ablations, injections, or embed under kills.

    The benchmark's own options follow its name; `python -m jobs.bench NAME --help` lists them.
    """
    from jobs.bench.__main__ import run

    with friendly_errors():
        print(json.dumps(run(name, context.args), indent=2))


def pretrain_line(metrics: dict[str, float], num_steps: int) -> str:
    """One line of progress."""
    known = ("caption", "match", "restate", "match_accuracy", "caption_accuracy")
    shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in known if name in metrics)
    return f"step {metrics['step']:.0f}/{num_steps}  {shown}  ETA {duration(metrics['eta_s'])}"


if __name__ == "__main__":
    app()
