"""What is read, searched and drawn: a big TSV, a pool of ten thousand experts, scenes."""

from __future__ import annotations

import statistics
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks import search as pool_search
from benchmarks import tsv as big_tsv
from benchmarks.speed.measuring import Sample, Setting, interleaved, seconds
from pituning.data.scenes import render, scene
from pituning.similarity.index import open_index

SCENES = 100


def tsv(setting: Setting) -> dict[str, Sample]:
    """Write, index, open and read a file like RefCOCO's; it is removed afterwards."""
    path = Path(setting.folder) / big_tsv.NAME
    try:
        found = big_tsv.measure(path, setting.pick(setting.gigabytes, 0.01), setting.pick(20_000, 40))
    finally:
        big_tsv.remove(path)
    figures = {
        "size": "gigabytes",
        "plain reading": "plain_read_mb_per_s",
        "indexing": "index_mb_per_s",
        "opening": "cold_open_s",
        "opening, peak": "cold_open_peak_mb",
        "1,000 rows read, peak": "cold_1000_rows_peak_mb",
        "text of random rows, not cached": "cold_text_rows_per_s",
        "text of random rows, after one reading": "cached_text_rows_per_s",
        "text and picture of random rows, not cached": "cold_picture_rows_per_s",
        "text and picture of random rows, after one reading": "cached_picture_rows_per_s",
    }
    return {name: Sample.once(found[key]) for name, key in figures.items()}


def search(setting: Setting) -> dict[str, Sample]:
    """Ten thousand synthetic experts: the index, queries, and what they find."""
    experts, queries = setting.pick(10_000, 30), setting.pick(100, 3)
    pool = pool_search.filled_pool(Path(setting.folder) / f"pool-of-{experts}", experts)
    taken = pool_search.index_seconds(pool)
    index = open_index(pool)
    names = pool_search.drawn_names(index, queries)
    by_cards = [1000 * s for s in pool_search.query_seconds(index, names)]
    whole = [1000 * s for s in pool_search.search_seconds(index, names)]
    found = statistics.fmean(pool_search.recalls(index, names[:20]))
    return {
        "experts": Sample.once(len(index.entries)),
        "index, from nothing": Sample.once(taken["build_s"]),
        "index, loaded": Sample.once(taken["load_s"]),
        "index, after ten changes": Sample.once(taken["update_10_s"]),
        "cards and compact embeddings": Sample.of(by_cards),
        "whole search": Sample.of(whole),
        "whole search, 95th percentile": Sample.once(statistics.quantiles(whole, n=20, method="inclusive")[-1]),
        "of the ten nearest, found": Sample.once(found),
    }


def scenes(setting: Setting) -> dict[str, Sample]:
    """Scenes of the training split, drawn up and rendered at 96 pixels, by one process."""
    numbers = count()
    amount = setting.pick(SCENES, 3)

    def some() -> None:
        for _ in range(amount):
            render(scene("train", next(numbers)))

    times = interleaved({"scenes": partial(seconds, some)}, setting.pick(30, 2), warm_up=setting.pick(5, 1))["scenes"]
    return {"scenes per second": Sample.rate(amount, times)}
