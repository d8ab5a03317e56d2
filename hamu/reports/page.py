"""The one-page report of a sweep: report.html, readable anywhere (no file or network beside it), and the figure in it.

from hamu.reports.page import write_results
write_results(Path("artifacts/results/digits/quickstart"))     # reads trials.parquet, writes pareto.png and report.html
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hamu.reports.cost import cost_text
from hamu.reports.figures import pareto_png
from hamu.reports.notes import notes_html
from hamu.reports.rows import Row, is_finite, status_of
from hamu.reports.summary import summarise
from hamu.reports.tables import (
    MAX_RETAIN_ACCURACY_LOSS,
    best_settings,
    pareto_front,
    setting_text,
    varying_settings,
    with_settings,
)
from hamu.reports.timing import peaks_text
from hamu.reports.views import View
from hamu.storage.files import patiently, read_json, replacing
from hamu.training.records import read_trials

_FACTS = ("name", "space", "task", "slots", "hardware", "cost", "search", "references_failed")

# Column of a trial, its heading, its format: "g" a number, "%" a share shown in percent, "s" words.
_SETTING_COLUMNS = {
    "method": ("method", "s"), "learning_rate": ("lr", "g"), "constraint_ratio": ("ratio", "g"), "rho": ("rho", "g"),
    "seed": ("seed", "g"), "forget_set": ("forget set", "s"),
}  # fmt: skip
_RESULT_COLUMNS = {
    "steps": ("steps", "g"), "stop_reason": ("stopped by", "s"), "forget_closeness": ("closeness", "g"),
    "forget_quality": ("forget quality (nats)", "g"),
    "retain_utility": ("retain utility (nats)", "g"), "retain_accuracy": ("retain acc. %", "%"),
    "forget_accuracy": ("forget acc. %", "%"), "test_accuracy": ("test acc. %", "%"),
    "forget_test_loss_auc": ("forget/test AUC", "g"), "train_s": ("train s", "g"), "trial_id": ("trial", "s"),
}  # fmt: skip
_TIMING_COLUMNS = {
    "method": ("method", "s"), "trials": ("trials", "g"), "steps": ("steps", "g"), "steps_s": ("s in steps", "g"),
    "train_s": ("train s", "g"), "step_ms": ("ms a step", "g"), "peaks": ("peak memory of each rank, MiB", "s"),
}  # fmt: skip
_STATE_COLUMNS = {"status": ("status", "s"), "note": ("note", "s")}


def write_results(folder: Path, *, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Draw pareto.png and write report.html from the trials.parquet of a results folder, replacing both whole.

    Args:
        folder: the results folder of one sweep.
        summary: what `summarise` returned. None: made from the trials and sweep.json (or summary.json) of the folder.

    Returns:
        The summary used.

    Raises:
        DataError: no trials.parquet in the folder.
    """
    folder = Path(folder)
    rows = read_trials(folder / "trials.parquet")
    used = dict(summary) if summary is not None else _summary_of(folder, rows)
    pareto_png(rows, folder / "pareto.png", title=str(used["space"]))
    _write_page(folder, rows, used)
    return used


def write_report(folder: Path, *, summary: Mapping[str, Any] | None = None) -> Path:
    """Write report.html alone (the figure is drawn when missing); arguments and errors as `write_results`."""
    folder = Path(folder)
    if not (folder / "pareto.png").exists():
        write_results(folder, summary=summary)
    else:
        rows = read_trials(folder / "trials.parquet")
        _write_page(folder, rows, dict(summary) if summary is not None else _summary_of(folder, rows))
    return folder / "report.html"


def _summary_of(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """The summary made anew from the trials: only what they do not say is taken from the folder's JSON files."""
    facts: dict[str, Any] = {"name": folder.name, "space": folder.name, "task": folder.parent.name, "slots": None}
    for name in ("sweep.json", "summary.json"):
        if (folder / name).exists():
            known = read_json(folder / name)
            facts.update({key: known[key] for key in _FACTS if known.get(key) is not None})
    if isinstance(facts["space"], Mapping):  # a plan may hold the whole space, not its name
        facts["space"] = facts["space"].get("name", folder.name)
    of_the_launcher = {key: facts.pop(key) for key in ("search", "references_failed") if key in facts}
    runs = [run for path in sorted(folder.glob("runs*.json")) for run in read_json(path)]
    return summarise(rows, runs=runs, **facts) | of_the_launcher


def _write_page(folder: Path, rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
    page = render_page(rows, summary, (folder / "pareto.png").read_bytes())

    def write() -> None:
        with replacing(folder / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8")

    patiently(write, folder=folder)


def render_page(rows: Sequence[Row], summary: Mapping[str, Any], png: bytes) -> str:
    """The report as one HTML text: pure, every value escaped, the figure inside it."""
    names = tuple(summary.get("settings") or varying_settings(rows))
    rows = with_settings(rows, names)
    settings = {key: column for key, column in _SETTING_COLUMNS.items() if key in names or key == "method"}
    settings |= {name: (name, "s") for name in names if name not in _SETTING_COLUMNS}
    if any(row.get("relative_constraint") for row in rows):
        settings |= {"relative_constraint": ("ratio is of S", "s")}
    fixed = {key: next((row[key] for row in rows if row.get(key) is not None), None) for key in _SETTING_COLUMNS}
    constant = ", ".join(
        f"{label} {_cell(fixed[key], kind)}"
        for key, (label, kind) in _SETTING_COLUMNS.items()
        if key not in settings and fixed[key] is not None
    )
    same = f" The same in all trials: {escape(constant)}." if constant else ""
    chosen = (summary.get("recommended") or {}).get("trial_id")
    noted = [{**row, "status": status_of(row), "note": row.get("error") or row.get("message")} for row in rows]
    title = escape(f"{summary['space']}: {summary['name']}")
    alt = "Time of a step by method" if summary.get("timing") else "Pareto front: forgetting against retained utility"
    sections = _timing(summary) if summary.get("timing") else _rankings(rows, summary, settings, same)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="headline">{_headline(rows, summary, names)}</p>
<dl>{"".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in _facts(summary))}</dl>
<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">
{sections}
<h2>All trials</h2><p>Click a heading to sort.</p>{_table(noted, {**settings, **_results(summary), **_STATE_COLUMNS}, chosen)}
<h2>How to read this</h2>{notes_html(summary)}
<script>{_SCRIPT}</script></body></html>
"""


def _results(summary: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Columns of results: the closeness in the reference view alone."""
    return {key: column for key, column in _RESULT_COLUMNS.items() if key != "forget_closeness" or summary["view"] == "reference"}


def _rankings(rows: Sequence[Row], summary: Mapping[str, Any], settings: Mapping[str, tuple[str, str]], same: str) -> str:
    view, columns = View(summary["view"]), {**settings, **_results(summary)}
    chosen = (summary.get("recommended") or {}).get("trial_id")
    front = _table(pareto_front(rows, view)[::-1], columns, chosen)
    best = _table(best_settings(rows, view), columns, chosen)
    return f"""<h2>Pareto front</h2><p>Trials that no other beats on both axes ({view.name} view).{same}</p>{front}
<h2>Best of each method</h2><p>Chosen as the setting to use is, see the notes; else the highest retain accuracy.</p>{best}"""


def _timing(summary: Mapping[str, Any]) -> str:
    table = [{**row, "peaks": peaks_text(row)} for row in summary["timing"]]
    shown = _table(table, _TIMING_COLUMNS, None)
    return f"<h2>Time and memory by method</h2><p>Medians over a method's trials; the largest peak.</p>{shown}"


def _headline(rows: Sequence[Row], summary: Mapping[str, Any], names: Iterable[str]) -> str:
    """What to use, in a sentence, or why nothing can be recommended and what to change."""
    chosen = summary.get("recommended")
    if chosen:
        original = next((row for row in rows if row.get("trial_id") == chosen["trial_id"]), {})
        changes = "; ".join(
            f"{split} accuracy {_cell(original.get(f'original_{split}_accuracy'), '%')} → "
            f"{_cell(chosen.get(f'{split}_accuracy'), '%')} %"
            for split in ("retain", "forget", "test")
        )
        words = setting_text({**original, **chosen}, dict.fromkeys(("learning_rate", "constraint_ratio", *names)))
        return f"Use <b>{escape(words)}</b>. {escape(changes)}. {_steps_text(chosen)}"
    if not rows:
        return "No trial has ended yet."
    if summary.get("timing"):
        fastest = summary["timing"][0]
        words = f"<b>{escape(str(fastest['method']))}</b>, {escape(_cell(fastest['step_ms'], 'g'))} ms a step"
        return f"This sweep measured times alone. Fastest: {words}."
    if all(row.get("steps") == 0 for row in rows if status_of(row) in ("finished", "dropped")):
        bound = _cell(summary.get("max_constraint_ratio"), "g")
        product = _cell(summary.get("gradient_product"), "g")
        shares = f", or shares of S below it divided by S, {escape(product)}"
        return f"No trial took a step. The largest feasible constraint ratio is {escape(bound)}: use ratios below it{shares}."
    percent = f"{100 * MAX_RETAIN_ACCURACY_LOSS:g}"
    return (
        f"No trial forgot and kept the retain accuracy within {percent} points of the original's: "
        "try a smaller learning rate or constraint ratio, or choose from the front below."
    )


def _steps_text(row: Row) -> str:
    return f"{_cell(row.get('steps'), 'g')} steps, {_cell(row.get('train_s'), 'g')} s."


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    trials, hardware = summary["trials"], summary.get("hardware")
    if isinstance(hardware, Mapping):
        hardware = ", ".join(f"{key} {value}" for key, value in hardware.items())
    ended = f"{trials['finished']} finished ({trials['early_stopped']} of them stopped early)"
    times = f"{_cell(summary.get('wall_s'), 'g')} s with {summary.get('slots') or '?'} trials at once"
    dropped = f"; {summary['dropped']} dropped, never run" if summary.get("dropped") else ""
    area, corner = summary.get("hypervolume"), summary.get("hypervolume_reference")
    measured = f"{_cell(area, 'g')} ({summary['view']} view, from ({corner[0]:g}, {corner[1]:.4g}))" if corner else "not known"
    search = summary.get("search")
    stopped = search.get("ended") if isinstance(search, Mapping) else None
    cost = cost_text(summary["cost"]).splitlines() if summary.get("cost") else []
    lost = "; ".join(f"{key}: {error}" for key, error in (summary.get("references_failed") or {}).items())
    return [
        ("trials", f"{trials['total']}: {ended}, {trials['failed']} failed, {trials['pruned']} pruned{dropped}"),
        *([] if summary.get("timing") else [("hypervolume of the Pareto front", measured)]),
        *([("search", str(stopped))] if stopped else []),
        *([("retain-only models that failed", lost)] if lost else []),
        ("stopped infeasible", f"{summary['infeasible']} ({summary['infeasible_at_start']} before the first step)"),
        ("S at the first step", _with_range(summary, "gradient_product")),
        ("largest feasible constraint ratio at the first step", _with_range(summary, "max_constraint_ratio")),
        ("wall time", f"{times}; {_cell(summary.get('train_s'), 'g')} s of training in all"),
        *(("cost" if i == 0 else "", line.removeprefix("cost: ")) for i, line in enumerate(cost)),
        ("hardware", str(hardware or "not recorded")),
    ]


def _with_range(summary: Mapping[str, Any], name: str) -> str:
    value, ends = summary.get(name), summary.get(f"{name}_range")
    if not ends or f"{ends[0]:.3g}" == f"{ends[1]:.3g}":
        return _cell(value, "g")
    return f"{_cell(value, 'g')} (median; {ends[0]:.3g} to {ends[1]:.3g} over the trials)"


def _cell(value: object, kind: str) -> str:
    if value is None or value != value:
        return "–"
    if kind == "%" and is_finite(value):
        return f"{100 * value:.1f}"
    if kind == "g" and isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if kind == "g" and isinstance(value, float) else str(value)


def _table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]], chosen: object) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(label)}</th>" for label, _ in columns.values())
    body = []
    for row in rows:
        mark = ' class="chosen"' if chosen is not None and row.get("trial_id") == chosen else ""
        cells = (
            f"<td{'' if kind == 's' else ' class=number'}>{escape(_cell(row.get(key), kind))}</td>"
            for key, (_, kind) in columns.items()
        )
        body.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}.headline{font-size:1.15em;background:#eef4fa;padding:.7em 1em;
border-left:4px solid #0072b2}img{max-width:100%;height:auto}dl div{display:flex;gap:1em;padding:.15em 0}
dt{flex:0 0 24em;color:#666}dd{margin:0}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88em}
th,td{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
th{cursor:pointer;background:#f5f5f5}
td:last-child{white-space:normal}.number{text-align:right;font-variant-numeric:tabular-nums}.chosen{background:#fff6d6}
"""

_SCRIPT = """
for (const th of document.querySelectorAll("th")) th.onclick = () => {
  const body = th.closest("table").tBodies[0], i = th.cellIndex, up = th.dataset.up !== "1";
  th.dataset.up = up ? "1" : "";
  const key = row => { const text = row.cells[i].textContent, n = parseFloat(text);
    return text === "–" ? null : (row.cells[i].className === "number" ? n : text); };
  [...body.rows].sort((a, b) => { const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); }).forEach(row => body.append(row));
};
"""
