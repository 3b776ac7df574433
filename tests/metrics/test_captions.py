"""Metrics of captions against sacrebleu, against the formulas worked out slowly, and against the published Java programs."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pycocoevalcap
import pytest
import sacrebleu

from pituning.errors import DataError, MissingDependencyError
from pituning.metrics import captions
from pituning.metrics.captions import bleu_4, caption_words, cider_d, meteor, spice

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime here")

REFERENCES = [
    ["a man rides a horse on the beach", "a man riding a horse along the shore", "someone on a brown horse"],
    ["two dogs play with a red ball in the grass", "two dogs are playing with a ball"],
    ["a plate of food with a fork and a knife", "a plate with meat and vegetables on a table", "some food"],
    ["a bus drives down a street", "the city bus is on the road", "a red bus in the city street"],
]
FOUND = [
    "a man riding a horse on the beach",
    "two dogs play with a ball",
    "a plate of food on a table",
    "a red bus drives down the city street",
]
CAPTIONS = [
    "A man's dog doesn't like the water.", "Two people, a boy and a girl, are playing.", "It's 10 o'clock on the clock tower!",
    "A black-and-white photo of a T-shirt", "He said \"hello\" to the cat; it left.", "A kitchen (with a stove) and a fridge.",
    "There are 2 cats... and 3 dogs", "They're riding waves; we've seen it.", "A person cannot see the sign.",
    "A red, white and blue kite.", "The children's toys are on the floor", "A woman who'll eat a sandwich",
    "An old-fashioned train - a steam engine - at the station", "A 12-inch pizza with cheese", "Is this a zebra?",
    "People sitting at a table: some eat, some talk", "A group of men playing frisbee on a field",
    "a bathroom with a toilet , sink and mirror .", "Someone's hand holding a cell phone", "A dog that isn't moving.",
]  # fmt: skip


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def random_corpus(seed: int) -> tuple[list[list[str]], list[str]]:
    rng = random.Random(seed)
    words = "a the man dog cat red runs sits on under big tree house".split()  # noqa: SIM905

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, 12)))

    return [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(12)], [sentence() for _ in range(12)]


def cider_by_the_formula(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """Vedantam et al. 2015: tf-idf vectors of 1- to 4-grams, clipped cosine, Gaussian length penalty with σ = 6, times 10."""
    documents = len(truth)
    scores = []
    for references, answer in zip(truth, found, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            frequency = Counter(g for refs in truth for g in {g for r in refs for g in grams(r, n)})

            def weights(
                text: str, n: int = n, frequency: Counter[tuple[str, ...]] = frequency
            ) -> dict[tuple[str, ...], float]:
                return {
                    g: c * (math.log(documents) - math.log(max(1, frequency[g]))) for g, c in grams(text, n).items()
                }

            mine = weights(answer)
            for reference in references:
                theirs = weights(reference)
                dot = sum(min(w, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, w in mine.items())
                norms = math.sqrt(sum(w * w for w in mine.values())) * math.sqrt(sum(w * w for w in theirs.values()))
                # the published code counts lengths in 2-grams
                delta = sum(grams(answer, 2).values()) - sum(grams(reference, 2).values())
                total += (dot / norms if norms else 0.0) * math.exp(-(delta**2) / 72) / len(references)
        scores.append(10 * total / 4)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_cider_d_is_the_formula(seed: int | None) -> None:
    truth, found = (REFERENCES, FOUND) if seed is None else random_corpus(seed)
    assert cider_d(truth, found) == pytest.approx(cider_by_the_formula(truth, found), rel=1e-9)
    assert cider_d(truth, found) > 0


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_bleu_4_is_that_of_sacrebleu(seed: int | None) -> None:
    truth, found = (REFERENCES, FOUND) if seed is None else random_corpus(seed)
    most = max(map(len, truth))
    streams = [[refs[i] if i < len(refs) else None for refs in truth] for i in range(most)]
    expected = sacrebleu.corpus_bleu(found, streams, tokenize="none", smooth_method="none", force=True).score / 100
    if expected:  # where no 4-gram matches, the published code has a tiny number instead of 0
        assert bleu_4(truth, found) == pytest.approx(expected, rel=1e-6)
    else:
        assert bleu_4(truth, found) < 0.05
    assert seed is not None or expected > 0.3


def test_bounds() -> None:
    same = [refs[0] for refs in REFERENCES]
    assert bleu_4(REFERENCES, same) == pytest.approx(1)
    assert cider_d([[s] for s in same], same) == pytest.approx(10)
    assert cider_d(REFERENCES, ["xyz"] * 4) == 0
    assert cider_d(REFERENCES[:1], FOUND[:1]) == 0, "words of a single document are no rarer than any other"
    assert bleu_4(REFERENCES, ["", *FOUND[1:]]) < bleu_4(REFERENCES, FOUND)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="at least one example"):
        cider_d([], [])
    with pytest.raises(DataError, match="example 1 has no reference"):
        bleu_4([["a"], []], ["a", "b"])


@needs_java
def test_words_are_those_of_the_published_tokenizer() -> None:
    folder = Path(next(iter(pycocoevalcap.__path__))) / "tokenizer"
    command = [
        "java",
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    lines = (
        subprocess.run(
            command, input="\n".join(CAPTIONS).encode(), capture_output=True, cwd=folder, timeout=120, check=True
        )
        .stdout.decode()
        .split("\n")
    )
    dropped = {"''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    for caption, line in zip(CAPTIONS, lines, strict=False):
        assert caption_words(caption) == " ".join(w for w in line.split() if w not in dropped), caption


@pytest.mark.slow
@needs_java
def test_meteor_is_the_published_program() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()
    try:
        expected, _ = program.compute_score(dict(enumerate(REFERENCES)), {n: [f] for n, f in enumerate(FOUND)})
    finally:
        for pipe in (program.meteor_p.stdin, program.meteor_p.stdout, program.meteor_p.stderr):
            pipe.close()
        program.meteor_p.kill()
        program.meteor_p.wait()
    assert meteor(REFERENCES, FOUND) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected < 0.9


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for metric, name in ((meteor, "METEOR"), (spice, "SPICE")):
        with pytest.raises(MissingDependencyError, match=f"{name} is a Java program"):
            metric(REFERENCES, FOUND)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(MissingDependencyError, match="nothing is downloaded"):
        spice(REFERENCES, FOUND)

    def fails(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(captions.importlib, "import_module", fails)  # type: ignore[attr-defined]
    with pytest.raises(MissingDependencyError, match=r"pip install 'pituning\[metrics\]'"):
        cider_d(REFERENCES, FOUND)
