"""The task graph of a pool for other programs: GraphML, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from pituning.experts.expert import ExpertCard
from pituning.report.graph_content import kind_of
from pituning.similarity.graph import GraphEdge, PoolGraph

_GRAPHML = "http://graphml.graphdrawing.org/xmlns"


def write_graph_files(found: PoolGraph, edges: Sequence[GraphEdge], folder: Path) -> list[Path]:
    """Write ``graph.json`` (all there is), ``similarity.csv`` (the matrix) and ``graph.graphml`` into a folder that exists.

    GraphML holds the given edges, with their similarity as ``weight``, and what the cards say as attributes of the nodes.

    Returns:
        the three paths.
    """
    document = folder / "graph.json"
    text = json.dumps(graph_document(found, edges), indent=2, ensure_ascii=False, allow_nan=False)
    document.write_text(text + "\n", encoding="utf-8")
    table = folder / "similarity.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *found.graph.names])
        writer.writerows([name, *row] for name, row in zip(found.graph.names, found.graph.matrix, strict=True))
    return [document, table, _write_graphml(found, edges, folder / "graph.graphml")]


def graph_document(found: PoolGraph, edges: Sequence[GraphEdge]) -> dict[str, Any]:
    """A pool's graph as plain values; ``order`` is that of the clustering's leaves."""
    graph = found.graph
    return {
        "kind": graph.kind,
        "experts": [{**asdict(card), "name": name} for name, card in zip(graph.names, found.cards, strict=True)],
        "matrix": [list(row) for row in graph.matrix],
        "order": [graph.names[n] for n in graph.clustered()],
        "edges": [{"left": graph.names[i], "right": graph.names[j], "similarity": s} for i, j, s in edges],
        "left_out": dict(found.left_out),
        "skipped_tensors": list(found.skipped),
    }


def _write_graphml(found: PoolGraph, edges: Sequence[GraphEdge], path: Path) -> Path:
    root = ET.Element("graphml", xmlns=_GRAPHML)
    cards = [_attributes(card) for card in found.cards]
    keys = {name: "d" + str(n) for n, name in enumerate(dict.fromkeys(k for card in cards for k in card))}
    for name, key in keys.items():
        number = all(isinstance(card.get(name, 0), int | float) for card in cards)
        described = {"id": key, "for": "node", "attr.name": name, "attr.type": "double" if number else "string"}
        ET.SubElement(root, "key", described)
    ET.SubElement(root, "key", {"id": "weight", "for": "edge", "attr.name": "weight", "attr.type": "double"})
    graph = ET.SubElement(root, "graph", edgedefault="undirected")
    for name, card in zip(found.graph.names, cards, strict=True):
        node = ET.SubElement(graph, "node", id=name)
        for attribute, value in card.items():
            ET.SubElement(node, "data", key=keys[attribute]).text = str(value)
    for left, right, similarity in edges:
        edge = ET.SubElement(graph, "edge", source=found.graph.names[left], target=found.graph.names[right])
        ET.SubElement(edge, "data", key="weight").text = repr(similarity)
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
    return path


def _attributes(card: ExpertCard) -> dict[str, str | float]:
    known = {
        "task": card.task, "kind": kind_of(card), "method": card.method, "backbone": card.backbone,
        "licence": card.licence, "shots": card.shots, "parameters": card.parameters, **card.metrics,
    }  # fmt: skip
    values: dict[str, str | float] = {key: value for key, value in known.items() if value is not None and value != ""}
    if card.lineage:
        values["lineage"] = ", ".join(f"{parent['name']} {parent['weight']:.3f}" for parent in card.lineage)
    return values
