"""The table: what is told of finished rows together, as JSON and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.bench.ablations.kept import LEVELS
from jobs.bench.ablations.subject import KINDS
from slq.metrics import paired_permutation
from slq.reranking.framings import FRAMINGS

Result = Mapping[str, Any]
_NOTES = (
    "hit@1 in %, text to image, on the hard subset, with 95% bootstrap intervals over queries; p: paired permutation "
    "against the default, not corrected for the number of rows.",
    "image->text, text->image: choices within hard pairs that are right, in %; group: pairs with all four right. Ties "
    "are wrong, and coarse scores break those that they can.",
    "tied: queries whose best score is tied; answered: pairs whose next token is a label more likely than not.",
    "pairs, LM tokens, vision passes: of ranking, as one call with nothing kept.",
    "Z is always the image's tokens; all input embeddings, as in RetLLM's release, are not offered and not measured.",
    "The text before the image shares nothing between pairs here, so each pays the whole image.",
)


def summary(results: Sequence[Result], framing: str) -> dict[str, Any]:
    """Rows with their p-values, and what they say of the default.

    Args:
        results: Of finished rows in the order of the table, the default among them.
        framing: Of the default.
    """
    by_name = {result["name"]: result for result in results}
    default = by_name["default"]
    rows = [_compared(result, default) for result in results]
    found = {"rows": rows, "framing": _framing(by_name, framing), "notes": list(_NOTES)}
    if "coarse" in by_name:
        found["fine_against_coarse"] = _against_coarse(default, by_name["coarse"])
    return found


def _compared(result: Result, default: Result) -> dict[str, Any]:
    """A row without hits of single queries, with p against the default."""
    if "problem" in result:
        return dict(result)
    told = {name: value for name, value in result.items() if name != "first"}
    if result["name"] != default["name"]:
        told["p"] = _p_values(result, default)
    return told


def _p_values(result: Result, default: Result) -> dict[str, float]:
    first, second = (np.array(one["first"], np.float64) for one in (result, default))
    half = len(first) // 2
    parts = {KINDS[0]: slice(0, half), KINDS[1]: slice(half, None), "both": slice(None)}
    return {kind: paired_permutation(first[part], second[part]) for kind, part in parts.items()}


def _framing(by_name: Mapping[str, Result], default: str) -> dict[str, Any]:
    """Which framing finds most, over both kinds of captions, and p of each against that of the default."""
    rows = {default: by_name["default"]}
    rows |= {name: by_name[name] for name in sorted(FRAMINGS) if name in by_name}
    shown = {name: row for name, row in rows.items() if "problem" not in row}
    hits = {name: float(np.mean(row["first"])) for name, row in shown.items()}
    return {
        "default": default,
        "hit@1": hits,
        "p": {name: _p_values(row, rows[default])["both"] for name, row in shown.items()},
        "best": max(hits, key=lambda name: hits[name]),
    }


def _against_coarse(fine: Result, coarse: Result) -> dict[str, Any]:
    p = _p_values(fine, coarse)
    return {
        kind: {
            "fine": fine["hits"][kind],
            "coarse": coarse["hits"][kind],
            "p": p[kind],
            "intervals_apart": fine["hits"][kind]["interval"][0]
            > coarse["hits"][kind]["interval"][1],
        }
        for kind in KINDS
    }


def markdown(found: Mapping[str, Any]) -> str:
    """All tables and notes, to paste."""
    parts = [_main(found["rows"]), _framing_line(found["framing"])]
    if "fine_against_coarse" in found:
        parts.append(_coarse_lines(found["fine_against_coarse"]))
    parts += [_positions(found["rows"]), _histograms(found["rows"]), _levels(found.get("kept"))]
    parts.append("\n".join(f"- {note}" for note in [*found["notes"], *_problems(found["rows"])]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _main(rows: Sequence[Result]) -> str:
    head = ["row", "explicit", "p", "knowledge", "p", "image->text", "text->image", "group"]
    head += ["tied", "answered", "pairs", "LM tokens", "vision passes"]
    body, group = [], ""
    for row in rows:
        if "problem" in row:
            continue
        if row["group"] and row["group"] != group:
            body.append([f"*{row['group']}*", *[""] * (len(head) - 1)])
        group = row["group"]
        body.append(_cells(row))
    return table(head, body)


def _cells(row: Result) -> list[str]:
    cells = [row["says"]]
    for kind in KINDS:
        cells += [_share(row["hits"][kind]), _p(row.get("p", {}).get(kind))]
    cells += [
        _percent(row["pairs"][name]["value"])
        for name in ("image_to_text", "text_to_image", "group")
    ]
    cells += [_percent(row.get("tied")), _percent(row.get("answered"))]
    cost = row["cost"]
    tokens = cost["prefix_tokens"] + cost["suffix_tokens"]
    return cells + [
        f"{n:,}" if n else "" for n in (row["num_pairs"], tokens, cost["vision_passes"])
    ]


def _framing_line(told: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {_percent(value)}"
        + ("" if name == told["default"] else f" ({_p_text(told['p'][name])})")
        for name, value in told["hit@1"].items()
    ]
    if len(shown) == 1:
        return ""
    return (
        f"**Framing.** hit@1 over both kinds, p against the default {told['default']}: {', '.join(shown)}. "
        f"Most hits: {told['best']}."
    )


def _coarse_lines(told: Mapping[str, Any]) -> str:
    lines = [
        f"{kind} {_share(one['fine'])} against {_share(one['coarse'])}, {_p_text(one['p'])}, intervals "
        + ("apart" if one["intervals_apart"] else "that touch")
        for kind, one in told.items()
    ]
    return f"**Fine against coarse.** {'; '.join(lines)}."


def _positions(rows: Sequence[Result]) -> str:
    body = []
    for row in rows:
        for direction, places in row.get("pairs", {}).get("position", {}).items():
            cells = [_share(places[name]) for name in ("option_1", "option_2", "averaged")]
            body.append([direction.replace("_to_", "->"), *cells])
    head = ["two options, right ones in %", "it is option 1", "it is option 2", "averaged"]
    return table(head, body) if body else ""


def _histograms(rows: Sequence[Result]) -> str:
    shown = [row for row in rows if "fired" in row]
    if not shown:
        return ""
    layers = list(shown[0]["fired"])
    body = [[row["says"], *(f"{row['fired'].get(n, 0):,}" for n in layers)] for row in shown]
    heads = [name if name == "never" else f"layer {name}" for name in layers]
    return table(["the trigger fires after", *heads], body)


def _levels(kept: Mapping[str, Any] | None) -> str:
    if not kept:
        return ""
    body = []
    for name in LEVELS:  # in their order, which JSON does not keep
        one = kept[name]
        cost = one["cost"]
        tokens = cost["prefix_tokens"] + cost["suffix_tokens"]
        numbers = (one["kept_bytes"], tokens, cost["vision_passes"])
        body.append([name, f"{one['pairs_per_s']:,.0f}", *(f"{number:,}" for number in numbers)])
    return table(["kept of images", "pairs/s", "bytes", "LM tokens", "vision passes"], body)


def _problems(rows: Sequence[Result]) -> list[str]:
    return [f"{row['name']}: not measured, {row['problem']}." for row in rows if "problem" in row]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but the first column set to the right."""
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rules, *body])


def _share(told: Mapping[str, Any]) -> str:
    low, high = told["interval"]
    return f"{_percent(told['value'])} ({_percent(low)}-{_percent(high)})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _p_text(value: float) -> str:
    shown = _p(value)
    return f"p < {shown[1:]}" if shown.startswith("<") else f"p = {shown}"
