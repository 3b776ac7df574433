"""Metrics of summaries: ROUGE; the package `rouge-score` computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pituning.errors import DataError, MissingDependencyError


def rouge(kind: str, truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """Mean F1 of shared n-grams (``rouge1``, ``rouge2``) or of the longest common subsequence (``rougeL``), 0 to 1.

    Of several references the best counts. Words are lower-cased runs of English letters and digits, reduced to
    their stems (Porter), as OFA's evaluation of Gigaword does.

    Source: Lin, "ROUGE", ACL 2004 workshop.

    Raises:
        DataError: if there are no examples, or one has no reference.
        MissingDependencyError: without the package.
    """
    require_package()
    from rouge_score.rouge_scorer import RougeScorer

    if not truth:
        raise DataError("ROUGE needs at least one example")
    if empty := [n for n, references in enumerate(truth) if not references]:
        raise DataError(f"example {empty[0]} has no reference summary to compare with")
    scorer = RougeScorer([kind], use_stemmer=True)
    scores = [
        max(scorer.score(reference, answer)[kind].fmeasure for reference in references)
        for references, answer in zip(truth, found, strict=True)
    ]
    return float(sum(scores) / len(scores))


def require_package() -> None:
    """What ROUGE needs is there.

    Raises:
        MissingDependencyError: if it is not.
    """
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("ROUGE needs the package rouge-score: pip install 'pituning[metrics]'") from error


METRICS: Mapping[str, Callable[[Sequence[Sequence[str]], Sequence[str]], float]] = {
    "ROUGE-1": partial(rouge, "rouge1"),
    "ROUGE-2": partial(rouge, "rouge2"),
    "ROUGE-L": partial(rouge, "rougeL"),
}
