"""Dashboard and alerts speak of series that there are, by labels that these have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.serving import exposition, metrics
from pipelines.serving.telemetry import STAGES

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
OF_RAY = {"WorkerId", "NodeAddress"}
OF_SERVE = {  # of Ray 2.60, as its agents export them
    "ray_serve_deployment_replica_healthy": {"application", "deployment", "replica"},
    "ray_serve_autoscaling_target_replicas": {"application", "deployment"},
    "ray_serve_replica_processing_queries": {"application", "deployment", "replica"},
    "ray_serve_deployment_queued_queries": {"application", "deployment", "handle"},
    "ray_serve_deployment_replica_starts_total": {"application", "deployment", "replica"},
}


def known() -> dict[str, set[str]]:
    """Labels of every series that may be asked for."""
    found = dict(OF_SERVE)
    for series in metrics.ALL:
        labels = {*series.tags, *OF_RAY}
        if series.kind == metrics.HISTOGRAM:
            found[f"{series.exported}_bucket"] = {*labels, "le"}
            found |= dict.fromkeys((f"{series.exported}_count", f"{series.exported}_sum"), labels)
        else:
            found[series.exported] = labels
    return found


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "serve-dashboard.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "serve-alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def expressions() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [rule["expr"] for rule in rules()]


def selectors(expression: str) -> list[tuple[str, str]]:
    """(name, what is between its braces) of every series that is named."""
    return re.findall(r"\b(ray_\w+|slq_\w+)(?:\{([^}]*)\})?", expression)


@pytest.mark.parametrize("expression", expressions())
def test_every_series_and_label_of_an_expression_exists(expression: str) -> None:
    labels_of = known()
    named = selectors(expression)
    assert named
    reachable = set()
    for name, matchers in named:
        assert name in labels_of, name
        asked = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", matchers)
        assert set(asked) <= labels_of[name], (name, asked)
        reachable |= labels_of[name]
    for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= reachable, grouped


@pytest.mark.parametrize("expression", expressions())
def test_brackets_of_an_expression_are_closed_in_order(expression: str) -> None:
    pairs, opened = {")": "(", "]": "[", "}": "{"}, []
    for character in re.sub(r'"[^"]*"', "", expression):
        if character in pairs.values():
            opened.append(character)
        elif character in pairs:
            assert opened.pop() == pairs[character]
    assert opened == []


@pytest.mark.parametrize("expression", expressions())
def test_totals_are_asked_for_as_rates_and_gauges_are_not(expression: str) -> None:
    """A total of Ray's agents begins again with a node, so only its rate means something; a gauge has none."""
    kinds = {series.exported: series.kind for series in metrics.ALL}
    for name, _ in selectors(expression):
        is_total = name.endswith(("_total", "_bucket", "_count", "_sum"))
        inside = re.search(rf"\b(?:rate|increase)\({name}\b", expression) is not None
        assert inside is is_total, name
        assert not (kinds.get(name) == metrics.GAUGE and inside)


@pytest.mark.parametrize("expression", [e for e in expressions() if "histogram_quantile" in e])
def test_quantiles_keep_the_label_that_they_are_made_of(expression: str) -> None:
    assert re.search(r"by \(le\b[^)]*\)\s*\(rate\(\w+_bucket\b", expression)


def test_the_datasource_is_chosen_in_grafana_and_nowhere_written_down() -> None:
    variables = {one["name"]: one for one in board()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels():
        for source in (panel["datasource"], *[one["datasource"] for one in panel["targets"]]):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    every = board()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


def test_legends_name_labels_that_are_left_of_the_sum() -> None:
    for panel in panels():
        for target in panel["targets"]:
            kept = " ".join(re.findall(r"\b(?:by)\s*\(([^)]*)\)", target["expr"]))
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"\b{label}\b", kept), (panel["title"], label)


def test_every_series_that_we_record_is_on_the_dashboard() -> None:
    text = json.dumps(board())
    missing = [one.name for one in metrics.ALL if one.exported not in text]
    assert missing == []


def test_every_alert_says_what_is_wrong_how_bad_it_is_and_what_to_do() -> None:
    assert {rule["alert"] for rule in rules()} >= {
        "SlqNoHealthyReplica",
        "SlqRefusals",
        "SlqDegradedAnswers",
        "SlqLatency",
        "SlqRecallDrop",
    }
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}
        assert re.fullmatch(r"\d+m", rule["for"])


def test_series_have_names_and_buckets_that_prometheus_takes() -> None:
    names = [series.name for series in metrics.ALL]
    assert len(set(names)) == len(names)
    for series in metrics.ALL:
        assert re.fullmatch(r"slq_serve_[a-z_]+", series.name)
        assert not series.name.endswith("_total")  # Ray adds it
        assert list(series.bounds) == sorted(set(series.bounds))
        assert (series.kind == metrics.HISTOGRAM) is bool(series.bounds)
        assert series.exported.startswith(exposition.OURS)
    assert set(STAGES) == {"queue", "embed", "search", "fetch", "fine"}
