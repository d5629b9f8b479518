"""The picture of a training run shows the numbers of its history, and leaves out what is not there."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from jobs.report.training_plot import running_mean, training_figure, write_training_plot
from pipelines.training_log import HISTORY, TrainingLog
from slq.errors import ArtifactError, ConfigError, DataError


def entry(step: int) -> dict[str, float]:
    found = {
        "loss": 3.0 / step,
        "temperature": 0.07 - 0.001 * step,
        "gradient_norm": 2.0 / step,
        "seconds/images": 3.0 if step < 11 else 0.0,
        "seconds/latents_backward": 1.0,
    }
    if step % 5 == 0:
        found |= {"text_to_image/hit@1": step / 40, "image_to_text/hit@1": step / 50}
    return found


HISTORY_OF_20: list[dict[str, float]] = [{"step": step, **entry(step)} for step in range(1, 21)]


def panels(history: list[dict[str, float]]) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in training_figure(history).axes}


def curve(axes: Axes, number: int = 0) -> list[tuple[float, float]]:
    return [tuple(point) for point in axes.lines[number].get_xydata().tolist()]


def test_every_panel_draws_what_the_history_says() -> None:
    found = panels(HISTORY_OF_20)
    assert list(found) == [
        "loss",
        "hit@k of evaluations",
        "temperature",
        "gradient norm before clipping",
        "share of time",
    ]
    for title, name in (
        ("loss", "loss"),
        ("temperature", "temperature"),
        ("gradient norm before clipping", "gradient_norm"),
    ):
        assert curve(found[title]) == [(line["step"], line[name]) for line in HISTORY_OF_20]
    hits = found["hit@k of evaluations"]
    assert curve(hits, 0) == [(step, step / 40) for step in (5, 10, 15, 20)]
    assert curve(hits, 1) == [(step, step / 50) for step in (5, 10, 15, 20)]
    legend = [text.get_text() for text in hits.get_legend().get_texts()]
    assert legend == ["hit@1 image → text", "hit@1 text → image"]


def test_shares_of_time_are_those_of_each_bin_and_of_the_whole_run() -> None:
    axes = panels(HISTORY_OF_20)["share of time"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["latents backward 40%", "images 60%"]  # 30 s and 20 s; top of the pile first
    images, latents = (patch.get_data() for patch in axes.patches)
    assert images.edges.tolist() == list(range(21))
    assert images.values.tolist() == [0.75] * 10 + [0.0] * 10
    assert latents.baseline.tolist() == images.values.tolist()
    assert latents.values == pytest.approx(np.ones(20))


def test_long_histories_are_binned_evenly() -> None:
    history = [{"step": step, "seconds/a": 1.0, "seconds/b": 3.0} for step in range(1, 131)]
    piece = panels(history)["share of time"].patches[0].get_data()
    assert set(np.diff(piece.edges[:-1])) == {4.0}
    assert piece.edges[-1] == 130
    assert piece.values == pytest.approx(np.full(33, 0.75))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_panels_without_data_are_left_out(count: int) -> None:
    names = ("loss", "temperature", "text_to_image/hit@5", "gradient_norm", "seconds/all")
    history = [{"step": step, **dict.fromkeys(names[:count], 0.5)} for step in (1, 2)]
    assert len(panels(history)) == count


def test_steps_that_are_not_finite_are_gaps_and_are_counted() -> None:
    history = [{"step": step, "loss": 1.0} for step in range(1, 101)]
    history[6]["loss"] = history[40]["loss"] = math.nan
    (title, axes), *_ = panels(history).items()
    assert title == "loss  (\N{MULTIPLICATION SIGN} not finite in 2 steps)"
    pale, mean, lost = axes.lines
    assert np.flatnonzero(np.isnan(pale.get_ydata())).tolist() == [6, 40]
    assert np.asarray(mean.get_ydata()) == pytest.approx(np.ones(100))
    assert lost.get_xdata().tolist() == [7, 41]


@pytest.mark.parametrize("reach", [0, 1, 3, 50])
def test_the_running_mean_is_that_of_a_centred_window(reach: int) -> None:
    values = np.random.default_rng(0).normal(size=21)
    values[[4, 5, 6, 20]] = np.nan
    for place, ours in enumerate(running_mean(values, reach)):
        near = min(reach, place, 20 - place)
        window = [v for v in values[place - near : place + near + 1] if not math.isnan(v)]
        expected = sum(window) / len(window) if window else math.nan
        assert ours == pytest.approx(expected, nan_ok=True)


def test_the_running_mean_leaves_a_straight_line_alone_up_to_its_ends() -> None:
    line = np.linspace(3.0, -1.0, 40)
    assert running_mean(line, 6) == pytest.approx(line)


@pytest.mark.parametrize("history", [[], [{"step": 1}], [{"step": 1, "loss": math.nan}]])
def test_a_history_with_nothing_to_draw_is_an_error(history: list[dict[str, float]]) -> None:
    with pytest.raises(DataError, match=rf"has {len(history)} steps and nothing to draw"):
        training_figure(history)


def log_of(folder: Path, last: int) -> Path:
    with TrainingLog(folder) as log:
        for step in range(1, last + 1):
            log.write(step, entry(step))
    return folder / HISTORY


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_one_history_always_gives_the_same_file(tmp_path: Path, kind: str) -> None:
    history = log_of(tmp_path, 20)
    first, second = (
        write_training_plot(history, tmp_path / f"{name}.{kind}").read_bytes() for name in "ab"
    )
    assert first == second
    if kind == "png":
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == (1584, 806)
    else:
        assert b"<svg" in first


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    write_training_plot(log_of(tmp_path, 1), tmp_path / "one.png")
    assert panels([HISTORY_OF_20[0]])["loss"].lines[0].get_marker() == "o"


def test_a_target_of_another_kind_and_a_missing_history_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plot\.pdf is neither \.svg nor \.png"):
        write_training_plot(log_of(tmp_path, 1), tmp_path / "plot.pdf")
    with pytest.raises(ArtifactError, match="is missing"):
        write_training_plot(tmp_path / "none.jsonl", tmp_path / "plot.svg")
