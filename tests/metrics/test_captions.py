"""Metrics of captions against sacrebleu, against the formulas worked out slowly, and against the published Java programs."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pycocoevalcap
import pytest
import sacrebleu

from pituning.backbones.base import Backbone
from pituning.errors import DataError, MissingDependencyError
from pituning.metrics import captions
from pituning.metrics.captions import bleu_4, caption_words, cider_d, meteor, spice
from pituning.training.evaluation import evaluate

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
CAPTIONS = """
A man's dog doesn't like the water.
Two people, a boy and a girl, are playing.
It's 10 o'clock on the clock tower!
A black-and-white photo of a T-shirt
He said "hello" to the cat; it left.
A kitchen (with a stove) and a fridge.
There are 2 cats... and 3 dogs
They're riding waves; we've seen it.
A person cannot see the sign.
A red, white and blue kite.
The children's toys are on the floor
A woman who'll eat a sandwich
An old-fashioned train - a steam engine - at the station
A 12-inch pizza with cheese
Is this a zebra?
People sitting at a table: some eat, some talk
A group of men playing frisbee on a field
a bathroom with a toilet , sink and mirror .
Someone's hand holding a cell phone
A dog that isn't moving.
A man riding a wave on top of a surfboard.
A woman's hand holding a half-eaten slice of pizza
The cat doesn't want to get off the laptop keyboard.
Two dogs, one black and one white, play with a frisbee in the yard.
A red double-decker bus driving down a street in London, England.
A black-and-white photo of a train pulling into St. Pancras station
A stop sign with a sticker that reads "STOP eating animals".
A sign says 'No Parking' on the side of a brick building.
The children's toys are scattered across the living-room floor
Boys' bicycles are lined up against the wall
It's a sunny day, and there aren't any clouds in the sky!
A plate of food with meat, potatoes & vegetables.
A clock tower that shows the time as 11:45 a.m.
The large clock reads 5:30 on a building.
A man in a suit and tie (and a top hat) stands outside.
A U.S. Navy airplane parked on the runway
A traffic light at the corner of 5th Ave. and 42nd St.
A bathroom with a toilet, a sink, and a bathtub/shower combination.
A baseball player wearing #23 swings at a ball.
Hot dogs for sale at $1.50 each, with 50% off the second one.
a kitchen with stainless steel appliances and granite counter tops
A group of people standing around a table with 1,000 cupcakes on it
A man wearing glasses and a hat -- sitting on a bench
A giraffe eating leaves... while another giraffe watches
What is this man doing on the roof?
A train that's stopped at a station; people are getting off.
There is a cake that says "Happy 50th Birthday, Mom!"
A person can't be seen behind the umbrella
A cafe called Café Müller, near the beach in São Paulo.
The two-year-old girl is blowing out the candles on her 'Dora' cake.
a baby elephant and it's mother walking through the grass .
A man on a motorcycle.A woman is sitting behind him.
A vase of flowers,a book and a lamp on a table
Mr. and Mrs. Smith cut their wedding cake with Dr. Jones.
A teddy bear that you'd love, they're all wearing pajamas
A photograph from the 1950's of a steam engine, No. 4468.
A surfer who has fallen off his board: the wave was too big
A street sign for Main St and Elm Rd
A parking meter with the words "O'Brien's Pub" written on it.
A couple of zebra's standing next to each other
Someone cannot reach the top shelf, so he's using a step-ladder.
A man says “cheese” and the photographer’s camera flashes
A 12-inch pizza with pepperoni, olives and/or mushrooms
A tennis player at the U.S. Open, sponsored by AT&T and J.P. Morgan
""".strip().splitlines()


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def random_corpus(seed: int) -> tuple[list[list[str]], list[str]]:
    rng = random.Random(seed)
    words = "a the man dog cat red runs sits on under big tree house".split()  # noqa: SIM905

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, 12)))

    truth = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(12)]
    # the answer is a reference with a word changed and some added or left out: 4-grams match
    kept = [rng.choice(references).split()[rng.randint(0, 1) :] for references in truth]
    return truth, [
        " ".join([*words[:-1], *rng.choices(["zebra", "the", "man"], k=rng.randint(0, 3))]) for words in kept
    ]


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


def bleu_by_the_formula(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """Papineni et al. 2002: clipped precisions over the whole corpus, their geometric mean, the brevity penalty."""
    mean = 0.0
    for n in (1, 2, 3, 4):
        shared = sum(
            min(count, max(grams(reference, n)[gram] for reference in references))
            for references, answer in zip(truth, found, strict=True)
            for gram, count in grams(answer, n).items()
        )
        mean += math.log(shared / sum(sum(grams(answer, n).values()) for answer in found)) / 4
    lengths = [len(answer.split()) for answer in found]
    nearest = [
        min((abs(len(r.split()) - mine), len(r.split())) for r in references)[1]
        for mine, references in zip(lengths, truth, strict=True)
    ]
    return math.exp(mean + min(0.0, 1 - sum(nearest) / sum(lengths)))


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_bleu_4_is_the_formula_and_that_of_sacrebleu(seed: int | None) -> None:
    truth, found = (REFERENCES, FOUND) if seed is None else random_corpus(seed)
    most = max(map(len, truth))
    streams = [[refs[i] if i < len(refs) else None for refs in truth] for i in range(most)]
    theirs = sacrebleu.corpus_bleu(found, streams, tokenize="none", smooth_method="none", force=True).score / 100
    assert 0.3 < theirs < 1
    assert bleu_4(truth, found) == pytest.approx(theirs, rel=1e-8)
    assert bleu_4(truth, found) == pytest.approx(bleu_by_the_formula(truth, found), rel=1e-8)


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
    with pytest.raises(DataError, match="none of them has a word"):
        cider_d([["."], [""]], ["a", "b"])
    with pytest.raises(DataError, match="example 1 has no reference"):
        bleu_4([["a"], []], ["a", "b"])


@needs_java
def test_words_are_those_of_the_published_tokenizer() -> None:
    """Not all texts are: half fractions, emoji, "€5", "C++", "a?b" and "'n'" come out otherwise."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    folder = Path(next(iter(pycocoevalcap.__path__))) / "tokenizer"
    tokenizer = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", "-cp", "stanford-corenlp-3.4.1.jar", *tokenizer],
        input="\n".join(CAPTIONS).encode(),
        capture_output=True,
        cwd=folder,
        timeout=120,
        check=True,
    )
    lines = done.stdout.decode().rstrip("\n").split("\n")
    for caption, line in zip(CAPTIONS, lines, strict=True):
        assert caption_words(caption) == " ".join(w for w in line.split() if w not in PUNCTUATIONS), caption


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("  ?\n", ""),
        ("Un café, à São Paulo", "un café à são paulo"),
        ("they'd've gone", "they 'd 've gone"),
        ("{a} [b] (c)", "-lcb- a -rcb- -lsb- b -rsb- -lrb- c -rrb-"),
        ("Dr. No says no. It is no. 5", "dr. no says no it is no. 5"),
        ("'cannot' and gonna", "can not and gon na"),
        ("日本", "日本"),
    ],
)
def test_words_as_recorded_from_the_published_tokenizer(text: str, words: str) -> None:
    assert caption_words(text) == words


@pytest.mark.slow
@needs_java
def test_meteor_is_the_published_program() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    truth = [*REFERENCES, ["un café à são paulo"], ["two dogs", "dogs"]]
    found = [*FOUND, "un café à são", ""]
    program = Meteor()
    try:
        expected, _ = program.compute_score(dict(enumerate(truth)), {n: [f] for n, f in enumerate(found)})
    finally:
        for pipe in (program.meteor_p.stdin, program.meteor_p.stdout, program.meteor_p.stderr):
            pipe.close()
        program.meteor_p.kill()
        program.meteor_p.wait()
    assert meteor(truth, found) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected < 0.9


def test_a_java_that_hangs_or_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexec 2>&1; cat >/dev/null; echo no memory >&2; exit 1\n")
    java.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(java))
    with pytest.raises(DataError, match=r"where 4 were expected \(exit code 1\)"):
        meteor(REFERENCES, FOUND)

    def hangs(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("java", 1.0)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(DataError, match="4 examples after 3600 seconds"):
        meteor(REFERENCES, FOUND)


def test_what_is_missing_is_said_before_anything_is_answered(
    bert: Backbone, make_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("pituning.training.evaluation._answers", lambda *args, **kwargs: pytest.fail("answered"))
    with pytest.raises(MissingDependencyError, match="METEOR is a Java program"):
        evaluate(bert, None, make_task(), metrics=["METEOR"])


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
