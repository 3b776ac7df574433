"""`pituning graph` and `pituning pool search`: the files, the page, and what is printed."""

from __future__ import annotations

import builtins
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from pituning.experts import ExpertCard, ExpertPool
from pituning.report.graph_content import Drawing, draw
from pituning.report.graph_page import render_graph
from pituning.similarity.graph import GRAPH_KINDS, PoolGraph, TaskGraph
from tests.cli.test_cli import error, run, run_json
from tests.similarity.test_measures import embedding

FILES = ["graph.json", "similarity.csv", "graph.graphml", "graph.html", "graph.png", "heatmap.png"]
HOSTILE = '</script><img src=x onerror="alert(1)">&'


@pytest.fixture
def embedded(pool: ExpertPool, backbone_of: Any, random_expert: Any) -> ExpertPool:
    """Four experts with embeddings at a shared point, and one without."""
    for seed in range(2, 5):
        expert = random_expert(backbone_of("encoder"), "lora", seed, name=f"task{seed}")
        pool.add(expert.with_card(licence="mit", shots=16, metrics={"accuracy": seed / 10}))
    for seed, name in enumerate(("word_tone", "pocket_gear", "task2", "task3")):
        values = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed))
        embedding({"w": values}, task=name, reference="shared").save(pool.folder / name)
    return pool


def cosines(count: int) -> Any:
    rows = [torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)).double().flatten() for seed in range(count)]
    matrix = torch.stack([r / r.norm() for r in rows])
    return (matrix @ matrix.T).numpy()


def synthetic(count: int, name: str = "expert") -> Drawing:
    rng = np.random.default_rng(count)
    points = rng.normal(size=(count, 3)) + 4 * np.eye(3)[rng.integers(3, size=count)]
    matrix = np.exp(-np.linalg.norm(points[:, None] - points[None], axis=-1) / 3)
    names = tuple(f"{name}-{n}" for n in range(count))
    cards = tuple(ExpertCard(n, task=name, method="lora", training={"task_kind": f"kind {len(n) % 9}"}) for n in names)
    graph = TaskGraph("x", names, tuple(map(tuple, matrix.tolist())))
    return draw(PoolGraph(graph, cards, {name: name}, (name,)), graph.edges(nearest=2))


class Loads(HTMLParser):
    """Whatever a page would load, and the images and handlers in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, key, value) for key, value in attrs if key in ("src", "href") or key.startswith("on")]


class TestGraph:
    def test_writes_the_page_pictures_and_data(self, embedded: ExpertPool, tmp_path: Path) -> None:
        out = tmp_path / "out"
        found = run_json("graph", "--pool", embedded.folder, "-o", out, "--nearest", 1)
        assert found["files"] == [str(out / name) for name in FILES]
        assert [e["name"] for e in found["experts"]] == ["pocket_gear", "task2", "task3", "word_tone"]
        order = [1, 2, 3, 0]
        np.testing.assert_allclose(found["matrix"], cosines(4)[np.ix_(order, order)], rtol=1e-6)
        assert list(found["left_out"]) == ["task4"]
        assert sorted(found["order"]) == [e["name"] for e in found["experts"]]
        stored = json.loads((out / "graph.json").read_text())
        assert stored == {key: value for key, value in found.items() if key not in ("pool", "files")}
        rows = list(csv.reader((out / "similarity.csv").read_text().splitlines()))
        assert rows[0] == ["", *(row[0] for row in rows[1:])]
        assert [[float(v) for v in row[1:]] for row in rows[1:]] == found["matrix"]
        for name in ("graph.png", "heatmap.png"):
            with Image.open(out / name) as picture:
                assert min(picture.size) > 300
        assert "task4" in (out / "graph.html").read_text()

    def test_graphml_holds_the_nodes_and_edges(self, embedded: ExpertPool, tmp_path: Path) -> None:
        found = run_json("graph", "--pool", embedded.folder, "-o", tmp_path, "--threshold", 0.5)
        space = "{http://graphml.graphdrawing.org/xmlns}"
        root = ET.parse(tmp_path / "graph.graphml").getroot()
        assert [n.get("id") for n in root.iter(f"{space}node")] == [e["name"] for e in found["experts"]]
        edges = [(e.get("source"), e.get("target"), float(e[0].text or "")) for e in root.iter(f"{space}edge")]
        assert edges == [(e["left"], e["right"], e["similarity"]) for e in found["edges"]]
        declared = {key.get("id") for key in root.iter(f"{space}key")}
        assert {data.get("key") for data in root.iter(f"{space}data")} == declared

    def test_graphml_is_read_by_networkx(self, embedded: ExpertPool, tmp_path: Path) -> None:
        networkx = pytest.importorskip("networkx")
        found = run_json("graph", "--pool", embedded.folder, "-o", tmp_path, "--threshold", 0.5)
        graph = networkx.read_graphml(tmp_path / "graph.graphml")
        assert sorted(graph) == [e["name"] for e in found["experts"]]
        assert {(*sorted(pair), graph.edges[pair]["weight"]) for pair in graph.edges} == {
            (*sorted((e["left"], e["right"])), e["similarity"]) for e in found["edges"]
        }
        assert graph.nodes["task2"] | {"parameters": 0} == {
            "task": "task-2", "kind": "lora", "method": "lora", "backbone": "tiny-bert", "licence": "mit", "shots": 16.0,
            "parameters": 0, "accuracy": 0.2,
        }  # fmt: skip

    @pytest.mark.parametrize("kind", GRAPH_KINDS)
    def test_every_kind(self, embedded: ExpertPool, tmp_path: Path, kind: str) -> None:
        names = ["--experts", "word_tone,task3"]
        found = run_json("graph", "--pool", embedded.folder, "-o", tmp_path, "--kind", kind, *names)
        assert found["kind"].startswith(kind)
        assert [e["name"] for e in found["experts"]] == ["word_tone", "task3"]

    def test_what_is_printed(self, embedded: ExpertPool, tmp_path: Path) -> None:
        shown = run("graph", "--pool", embedded.folder, "-o", tmp_path).stdout
        assert "The most similar of 4 experts by fisher-cosine (shared)" in shown
        assert "left out: task4: " in shown
        assert f"saved to {tmp_path / 'graph.html'}" in shown

    def test_without_matplotlib_all_but_the_pictures_are_written(
        self, embedded: ExpertPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = builtins.__import__

        def refuse(name: str, *rest: Any, **options: Any) -> Any:
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *rest, **options)

        monkeypatch.setattr(builtins, "__import__", refuse)
        found = run("graph", "--pool", embedded.folder, "-o", tmp_path / "out", "--json")
        assert json.loads(found.stdout)["files"] == [str(tmp_path / "out" / name) for name in FILES[:4]]
        assert "matplotlib" in found.stderr

    def test_nothing_to_compare(self, pool: ExpertPool, tmp_path: Path) -> None:
        text = error("graph", "--pool", pool.folder, "-o", tmp_path / "out")
        assert "pituning embed word_tone --reference shared" in text
        assert not (tmp_path / "out").exists()


class TestPage:
    @pytest.mark.parametrize("count", [2, 5, 40, 90])
    def test_is_complete_in_itself(self, count: int) -> None:
        drawing = synthetic(count)
        page = render_graph(drawing, "title")
        # plotly.js itself names a few addresses; the page's own parts must not load any.
        assert {(tag, key, value) for tag, key, value in Loads(page).found} <= {
            ("img", "src", "graph.png"), ("img", "src", "heatmap.png"),
        }  # fmt: skip
        match = re.search(r'<script type="application/json" id="graph-data">(.*?)</script>', page)
        assert match is not None
        nodes = json.loads(match[1])["nodes"]
        matrix = np.array(drawing.found.graph.matrix)
        np.fill_diagonal(matrix, -1)
        assert [node["neighbours"][0][0] for node in nodes] == matrix.argmax(axis=1).tolist()

    def test_names_are_never_markup(self) -> None:
        page = render_graph(synthetic(3, HOSTILE), HOSTILE)
        assert not [found for found in Loads(page).found if found[1] == "onerror" or found[2] == "x"]
        assert "<img src=x" not in page

    def test_labels_of_many_experts_cover_nothing(self) -> None:
        drawing = synthetic(150, "a_long_task_name")
        nodes, shown = drawing.layout.positions, sorted(drawing.fitting)
        assert 10 < len(shown) < 150
        halves = [3.0 * len(drawing.labels[n]) for n in shown]  # 6 pixels a character at 11 pixels is generous
        for i, n in enumerate(shown):
            label = nodes[n] - [0, drawing.radius + 9]
            for j, other in enumerate(shown[:i]):
                apart = np.abs(label - (nodes[other] - [0, drawing.radius + 9]))
                assert apart[0] >= halves[i] + halves[j] or apart[1] >= 14
            for node in np.delete(np.arange(150), n):
                apart = np.abs(label - nodes[node])
                assert apart[0] >= halves[i] or apart[1] >= 7
        gaps = np.linalg.norm(nodes[:, None] - nodes[None], axis=-1) + 100 * np.eye(150)
        assert gaps.min() >= 2 * drawing.radius

    def test_kinds_have_colours_and_rare_ones_share_grey(self) -> None:
        cards = [ExpertCard("x", training={"task_kind": f"k{n}"}) for n in range(8) for _ in range(9 - n)]
        graph = TaskGraph("x", tuple(map(str, range(len(cards)))), tuple(map(tuple, np.eye(len(cards)).tolist())))
        drawing = draw(PoolGraph(graph, tuple(cards), {}), graph.edges())
        assert list(drawing.colours) == ["k0", "k1", "k2", "k3", "k4", "k5", "other"]
        assert len(set(drawing.colours.values())) == 7
        assert drawing.kinds[0] == "k0"
        assert drawing.kinds[-1] == "other"


class TestPoolSearch:
    def test_like_an_expert(self, embedded: ExpertPool) -> None:
        found = run_json("pool", "search", "--pool", embedded.folder, "--like", "task2", "--top", 2)
        slow = cosines(4)[2]
        names = ["word_tone", "pocket_gear", "task2", "task3"]
        nearest = sorted((n for n in range(4) if n != 2), key=lambda n: -slow[n])[:2]
        assert [e["name"] for e in found["experts"]] == [names[n] for n in nearest]
        assert [e["similarity"] for e in found["experts"]] == pytest.approx([slow[n] for n in nearest], rel=1e-6)
        assert (found["like"], found["matching"], found["incomparable"], found["read"]) == (["task2"], 4, 1, 5)
        again = run_json("pool", "search", "--pool", embedded.folder, "--like", "task2", "--top", 2)
        assert again == {**found, "read": 0}

    def test_by_cards(self, embedded: ExpertPool, break_tensors: Any) -> None:
        break_tensors(embedded.folder / "task4")
        verb = ["pool", "search", "--pool", embedded.folder, "--license", "MIT", "--metric", "accuracy<0.4"]
        assert [e["name"] for e in run_json(*verb, "--backbone", "tiny-bert")["experts"]] == ["task2", "task3"]
        shown = run(*verb).stdout
        assert "all of them: method lora, licence mit, backbone tiny-bert" in shown
        assert "2 of 5 experts match" in shown
        assert "broken: task4: " in shown

    def test_mistakes(self, embedded: ExpertPool) -> None:
        verb = ["pool", "search", "--pool", embedded.folder]
        assert "accuracy>=0.8" in error(*verb, "--metric", "good")
        assert "did you mean 'task-2'" in error(*verb, "--like", "task-22")
