"""`slq compare`: several variants of one recipe, trained and measured alike, in one table."""

from typing import Any

from jobs.compare.chart import write_category_chart, write_study_chart
from jobs.compare.page import write_study_page
from jobs.compare.running import Flows, real_flows, run_study
from jobs.compare.study import Plan, plan_study
from jobs.compare.tables import study_markdown, study_summary, study_table
from slq.errors import StorageError
from slq.files import write_json

__all__ = ["compare", "outline", "plan_study", "study_table"]


def compare(plan: Plan, flows: Flows | None = None) -> dict[str, Any]:
    """Run a study and write `study.json`, `.md`, `.png` and `.html`; run it again to finish what is missing.

    Where queries have categories, `categories.png` shows them.

    Args:
        plan: The resolved study.
        flows: What to run; those of `pipelines` by default.

    Returns:
        What `study.json` holds.

    Raises:
        StorageError: The folder cannot be written.
    """
    try:
        plan.out_dir.mkdir(parents=True, exist_ok=True)
        summary = study_summary(plan, run_study(plan, flows or real_flows()))
        write_json(plan.out_dir / "study.json", summary)
        (plan.out_dir / "study.md").write_text(study_markdown(summary))
        write_study_chart(summary, plan.out_dir / "study.png")
        write_category_chart(summary, plan.out_dir / "categories.png")
        write_study_page(summary, plan.out_dir / "study.html")
    except OSError as error:
        raise StorageError(
            f"{plan.out_dir} cannot be written: {error}; free space or choose another folder"
        ) from None
    return summary


def outline(plan: Plan) -> dict[str, Any]:
    """What a dry run shows: the number of trainings, and every run as it would be."""
    return {
        "trainings": plan.num_trainings,
        "tune_steps": plan.study.tune_steps,
        "retention_scenes": plan.study.retention_scenes,
        "runs": {
            run.name: {
                "folder": str(run.folder),
                "tune": {run.key: [trial.value for trial in run.trials]} if run.key else {},
                "recipe": run.recipe.model_dump(mode="json"),
            }
            for run in plan.runs
        },
    }
