"""The page and the pictures, from full, small and hostile results."""

from __future__ import annotations

import builtins
import json
import random
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import example_results, minimal_results
from PIL import Image

from pituning.errors import PituningError
from pituning.report import write_report
from pituning.report.content import read_content
from pituning.report.layout import LINE_HEIGHT, NODE_RADIUS, lay_out

SECTIONS = {
    "differences": "Differences",
    "ranking": "Predicted helpers",
    "graph": "Task graph",
    "weights": "Weights",
    "candidates": "Candidates",
    "audit": "Leak audit",
}


class Page(HTMLParser):
    """What a reader without JavaScript sees, and everything that the page would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "h2", "td"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside != "style":
            self.text.append(data)
        if inside == "h2":
            self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def charts(self) -> int:
        return sum("Plotly.newPlot" in script and len(script) < 1_000_000 for script in self.scripts)


def written(results: Mapping[str, Any], folder: Path) -> Page:
    return Page(write_report(results, folder).read_text(encoding="utf-8"))


def test_full_results_show_every_section_and_number(tmp_path: Path) -> None:
    results = example_results()
    page = written(json.loads(json.dumps(results)), tmp_path)
    assert page.headings == ["Results", *SECTIONS.values(), "How this was made"]
    assert page.charts == 5
    values = results["arms"][-1]["values"]
    assert f"{100 * np.mean(values):.1f} {100 * np.std(values, ddof=1):.1f}" in page.words
    assert " ".join(f"{100 * value:.1f}" for value in values) in page.words
    assert f"{np.mean(results['arms'][-1]['log_loss']):.3f}" in page.words
    assert "86.0 %" in page.words
    assert "5 min 12 s" in page.words
    assert results["command"] in page.words


def test_minimal_results_show_one_section(tmp_path: Path) -> None:
    page = written(minimal_results(), tmp_path)
    assert page.headings == ["Results"]
    assert page.charts == 1
    assert "one seed" in page.words
    assert "81.0" in page.words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.png"]


@pytest.mark.parametrize("key", SECTIONS)
def test_absent_part_leaves_only_its_section_out(tmp_path: Path, key: str) -> None:
    results = example_results()
    del results[key]
    expected = ["Results", *(title for name, title in SECTIONS.items() if name != key), "How this was made"]
    assert written(results, tmp_path).headings == expected


def test_one_seed_has_neither_deviation_nor_interval(tmp_path: Path) -> None:
    results = example_results(seeds=1)
    results["differences"][0] |= {"low": 0.01, "high": 0.09}
    page = written(results, tmp_path)
    assert "one seed" in page.words
    assert "No interval was computed from one seed" in page.words
    for word in ("std. dev.", "±", "per seed", "nan", "+1.0 to"):
        assert word not in page.words


def test_nothing_is_loaded_and_plotly_is_there_once(tmp_path: Path) -> None:
    page = written(example_results(), tmp_path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        if tag == "script":
            assert not attributes.get("src")
        for name in ("src", "href"):
            assert not (attributes.get(name) or "").startswith(("http:", "https:", "//"))
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(example_results(), tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> $title & \"q\""


def hostile(value: Any, key: str = "") -> Any:
    """Every string of a mapping replaced, but for the words that have a meaning and are never shown as given."""
    if isinstance(value, str):
        return value if key in ("metric", "default", "kinds") else f"{value} {HOSTILE}"
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    return [hostile(item, key) for item in value] if isinstance(value, list) else value


def test_strings_from_outside_are_text_never_markup(tmp_path: Path) -> None:
    harmless, attacked = written(example_results(), tmp_path / "a"), written(hostile(example_results()), tmp_path / "b")
    count = lambda page, tag: sum(name == tag for name, _ in page.tags)  # noqa: E731
    for tag in ("script", "img"):
        assert count(attacked, tag) == count(harmless, tag)
    assert not any("onerror" in attributes for _, attributes in attacked.tags)
    assert HOSTILE in "".join(attacked.text)
    # In the charts plotly reads a few tags of its own; the names must reach it as entities.
    for script in attacked.scripts:
        if len(script) < 1_000_000:
            assert not re.search(r"(<|\\u003c)\s*(script|img)", script, re.IGNORECASE)


def test_pictures_are_real_and_those_of_an_earlier_report_go(tmp_path: Path) -> None:
    write_report(example_results(), tmp_path)
    for name in ("results.png", "graph.png", "weights.png"):
        assert (tmp_path / name).stat().st_size > 5_000
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").resize((100, 100)).tobytes())) > 10
    write_report(minimal_results(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.png"]


def test_without_matplotlib_the_page_is_written_and_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(PituningError, match=r"pip install 'pituning\[demo\]'"):
        write_report(minimal_results(), tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": []}, "no arms"),
        ({"title": ""}, "no title"),
        ({"arms": [{"name": "own", "values": []}]}, "'own' has no values"),
        ({"arms": [{"name": "own", "values": [0.5, float("nan")]}]}, "'own' holds nan"),
        ({"weights": {"experts": ["a", "b"], "groups": ["g"], "values": [[1.0]]}}, r"weights.*1 × 2.*\(1, 1\)"),
        ({"weights": {"experts": ["a"], "groups": ["g"], "values": [[float("inf")]]}}, "weights.*not finite"),
        ({"graph": {"names": ["a", "b"], "matrix": [[1.0, 0.5], [0.5]]}}, "graph.*2 × 2"),
    ],
)
def test_broken_results_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PituningError, match=message):
        write_report(minimal_results() | change, tmp_path)


def test_ranking_is_sorted_by_the_default_similarity_and_says_how_well_it_foretold() -> None:
    results = example_results()
    random.Random(3).shuffle(results["ranking"]["experts"])
    ranking = read_content(results).ranking
    assert ranking is not None
    scores = [expert.values["score"] for expert in ranking.experts]
    assert scores == sorted(scores, key=lambda score: -(score or 0.0))
    pairs = [(e.values["score"], e.gain) for e in ranking.experts if e.gain is not None]
    # Spearman by hand: 1 − 6 Σ d² / n(n² − 1), without ties.
    ranks = [[sorted(column).index(value) for value in column] for column in map(list, zip(*pairs, strict=True))]
    squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    count = len(pairs)
    assert ranking.agreement("score") == pytest.approx(1 - 6 * squares / (count * (count**2 - 1)))


@pytest.mark.parametrize("count", [2, 3, 7, 20, 40])
@pytest.mark.parametrize("kind", ["spread", "equal", "unknown", "clustered"])
def test_no_node_or_label_of_a_graph_covers_another(count: int, kind: str) -> None:
    numbers = np.random.default_rng(count)
    points = numbers.normal(size=(count, 3))
    if kind == "clustered":
        points[1:] *= 1e-3
    matrix = -np.linalg.norm(points[:, None] - points[None], axis=-1)
    if kind == "equal":
        matrix[:] = 0.5
    if kind == "unknown":
        matrix[:, 1] = np.nan
    names = [f"a_rather_long_task_{i}" for i in range(count)]
    results = minimal_results() | {
        "graph": {"kind": "x", "names": names, "matrix": matrix.tolist(), "target": names[0]}
    }
    graph = read_content(results).graph
    assert graph is not None
    layout = lay_out(graph)
    assert np.isfinite(layout.positions).all()
    # 6.4 pixels a character at 13 pixels is generous for a sans-serif face.
    halves = np.array([6.4 * len(label) / 2 for label in layout.labels])
    for i, (x, y) in enumerate(layout.positions):
        assert halves[i] <= x <= layout.width - halves[i]
        assert NODE_RADIUS + LINE_HEIGHT <= y <= layout.height - NODE_RADIUS
        for j in range(i):
            across, down = abs(x - layout.positions[j, 0]), abs(y - layout.positions[j, 1])
            assert across >= halves[i] + halves[j] or down >= 2 * NODE_RADIUS + LINE_HEIGHT
    assert np.array_equal(layout.positions, lay_out(graph).positions)
    for edge in layout.edges:
        assert 0.0 <= edge.strength <= 1.0
