"""The figure and the one-page report of a results folder."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from hamu.errors import DataError
from hamu.reports.figures import pareto_png
from hamu.reports.page import render_page, write_report, write_results
from hamu.reports.summary import summarise
from hamu.training.records import write_trials

PNG = b"\x89PNG\r\n\x1a\n"


def trials():
    rows = []
    for i, (method, x, y) in enumerate(
        [
            ("hamu-q", 0.4, 0.05),
            ("hamu-q", 1.2, 0.02),
            ("hamu-u", 2.0, -0.005),
            ("ga", 400.0, -30.0),
            ("mine", 0.1, 0.0),
        ]
    ):
        rows.append({
            "trial_id": f"{i:04d}-{method}", "sweep": "demo", "task": "digits", "method": method, "seed": 42,
            "rho": 0.0, "learning_rate": 0.01 * (i + 1),
            "constraint_ratio": 0.3 if "hamu" in method else None, "status": "finished",
            "stop_reason": "finished", "steps": 20, "train_s": 5.0, "started_at": 5.0 * i, "ended_at": 5.0 * i + 5.5,
            "forget_quality": x, "retain_utility": y, "retain_accuracy": 0.95 + max(y, -0.5), "forget_accuracy": 0.1,
            "test_accuracy": 0.85, "original_retain_accuracy": 0.95, "original_forget_accuracy": 0.99,
            "original_test_accuracy": 0.92, "gradient_product": 0.92, "max_constraint_ratio": 0.88,
        })  # fmt: skip
    rows.append({**rows[0], "trial_id": "0005-hamu-q", "steps": 0, "stop_reason": "infeasible",
                 "message": "ratio < 0.88", "forget_quality": 0.0, "retain_utility": 0.0})  # fmt: skip
    rows.append({"trial_id": "0006-kl", "method": "kl", "status": "failed", "error": "<script>alert('x')</script> & co"})
    return rows


class Tags(HTMLParser):
    """Start tags with attributes, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_results_folder_gets_a_figure_and_a_self_contained_page(tmp_path):
    folder = tmp_path / "digits" / "demo"
    write_trials(folder / "trials.parquet", trials())
    (folder / "sweep.json").write_text(json.dumps({"space": "digits/quickstart", "slots": 2, "hardware": {"cores": 2}}))
    summary = write_results(folder)
    assert (summary["name"], summary["space"], summary["task"], summary["slots"]) == (
        "demo",
        "digits/quickstart",
        "digits",
        2,
    )
    assert (folder / "pareto.png").read_bytes().startswith(PNG)
    assert sorted(os.listdir(folder)) == ["pareto.png", "report.html", "sweep.json", "trials.parquet"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Tags(text)
    assert page.open == []
    sources = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?:", text)
    for words in (
        "Use <b>hamu-u, lr 0.03, ratio 0.3</b>",
        "1 (1 before the first step)",
        "0.88",
        "rewards over-forgetting",
    ):
        assert words in text


def test_values_are_escaped(tmp_path):
    rows = trials()
    page = render_page(rows, summarise(rows, name="<i>", space='"&"', task="t", slots=1), PNG)
    assert "<i>" not in page
    assert "alert('x')" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; co" in page
    assert len([tag for tag, _ in Tags(page).tags if tag == "script"]) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "No trial has ended yet"),
        (trials()[5:6], "No trial took a step. The largest feasible constraint ratio is 0.88"),
        (trials()[3:4], "No trial forgot and kept the retain accuracy within 1 points"),
    ],
)
def test_headline_says_why_nothing_can_be_recommended(rows, words):
    assert words in render_page(rows, summarise(rows, name="n", space="s", task="t", slots=1), PNG)


def test_page_is_made_anew_from_the_trials_not_from_an_old_summary(tmp_path):
    write_trials(tmp_path / "trials.parquet", trials()[:2])
    old = summarise(trials()[:1], name="n", space="digits/quickstart", task="digits", slots=3)
    (tmp_path / "summary.json").write_text(json.dumps(old))
    summary = write_results(tmp_path)
    assert (summary["trials"]["total"], summary["slots"], summary["space"]) == (2, 3, "digits/quickstart")
    assert write_report(tmp_path) == tmp_path / "report.html"


def test_page_made_anew_leaves_out_the_pauses_between_runs(tmp_path):
    write_trials(
        tmp_path / "trials.parquet",
        [{**row, "started_at": 1e6 * i, "ended_at": 1e6 * i + 9} for i, row in enumerate(trials()[:2])],
    )
    assert write_results(tmp_path)["wall_s"] == 1e6 + 9
    (tmp_path / "runs.json").write_text(json.dumps([{"started_at": 1e6 * i, "ended_at": 1e6 * i + 10} for i in range(2)]))
    assert write_results(tmp_path)["wall_s"] == 20


def test_folder_without_trials_is_refused(tmp_path):
    with pytest.raises(DataError, match="no trials at"):
        write_results(tmp_path)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0.0, 0.0)],
        [(1.0, 0.1)],
        [(math.nan, 1.0), (1.0, math.inf)],
        [(1e-3 * i, -1e-4 * i) for i in range(40)],
        [(3.0**i, -(2.0**i)) for i in range(-8, 12)],
        [(-1.0, -1.0), (-2.0, 1.0)],
        [(1e300, -1e300), (1e-12, 0.0)],
    ],
    ids=["none", "original", "one", "non-finite", "crowded", "explosive", "no-forgetting", "extreme"],
)
def test_figure_can_be_drawn_from_any_points(tmp_path, points):
    rows = [
        {"trial_id": str(i), "method": "gru", "learning_rate": 0.1 * i, "forget_quality": x, "retain_utility": y}
        for i, (x, y) in enumerate(points)
    ]
    pareto_png(rows, tmp_path / "pareto.png", title="any", dpi=50)
    assert (tmp_path / "pareto.png").read_bytes().startswith(PNG)
    assert os.listdir(tmp_path) == ["pareto.png"]
