"""`pituning graph`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pituning.cli.options import OptionalModelOptions, PoolOptions, comma_separated
from pituning.cli.output import Output, table
from pituning.cli.rank import Reference
from pituning.cli.verb import verb
from pituning.errors import PituningError

GraphKind = Literal["fisher-cosine", "fisher", "fisher-paper", "weights"]
_SHOWN = 10


@verb
def graph(
    pool: PoolOptions,
    output: Output,
    model: OptionalModelOptions,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Write the page and the files into this folder.")
    ] = Path("graph"),
    kind: Annotated[
        GraphKind,
        typer.Option(help="Similarity: of the stored task embeddings (fisher…), or of what was trained (weights)."),
    ] = "fisher-cosine",
    reference: Annotated[
        Reference, typer.Option(help="Which embeddings: all made at one shared expert, or each at its own.")
    ] = "shared",
    threshold: Annotated[
        float | None, typer.Option(metavar="X", help="Draw the edges that are at least so similar.")
    ] = None,
    nearest: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Draw each expert's edges to the K most similar [default: 3]."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Only experts of this method; needed where the pool holds several.")
    ] = None,
    experts: Annotated[str | None, typer.Option(metavar="A,B,C", help="Only these experts.")] = None,
) -> None:
    """Draw which tasks of a pool are alike: an interactive page with the graph and a clustered heat map.

    Beside the page (graph.html) come pictures (graph.png, heatmap.png) and the data (graph.json, similarity.csv,
    graph.graphml). The Fisher kinds need embeddings: run pituning embed first; --kind weights of methods other than lora and
    bitfit needs their --backbone.

    Example: pituning graph --pool experts -o graph
    """
    names = comma_separated("--experts", experts)
    with output.status(f"comparing the experts of {pool.pool}"):
        from pituning.report.graph_files import graph_document, write_graph_files
        from pituning.report.graph_page import write_graph_page
        from pituning.similarity.graph import pool_graph

        found = pool_graph(pool.open(), kind, reference, method=method, names=names, backbone=model.load())
        edges = found.graph.edges(nearest=nearest, threshold=threshold)
    with output.status("drawing"):
        out.mkdir(parents=True, exist_ok=True)
        files = write_graph_files(found, edges, out)
        try:
            files += write_graph_page(found, edges, f"Tasks of {pool.pool.name}", out)
        except PituningError as error:
            output.note(f"note: {error}")
            files.append(out / "graph.html")
    rows = [
        [found.graph.names[left], found.graph.names[right], f"{similarity:.4f}"]
        for left, right, similarity in edges[:_SHOWN]
    ]
    title = f"The most similar of {len(found.cards)} experts by {found.graph.kind}"
    output.result(
        {"pool": pool.pool, **graph_document(found, edges), "files": files},
        table(title, ["expert", "expert", "similarity#"], rows),
        *(f"left out: {name}: {why}" for name, why in found.left_out.items()),
        *(f"saved to {path}" for path in files),
    )
