"""Metrics of captions: BLEU-4, CIDEr-D, METEOR and SPICE, as the published COCO evaluation computes them.

`pycocoevalcap` computes them. The evaluation first cuts texts into words with Stanford's tokenizer, a Java program;
:func:`caption_words` does the same for BLEU-4 and CIDEr-D without Java. METEOR and SPICE are Java programs themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pituning.errors import DataError, MissingDependencyError

JAVA_TIMEOUT = 3600  # seconds
INSTALL = "pip install 'pituning[metrics]'"

_ABBREVIATIONS = (
    "assn ave blvd bros calif capt co col corp dept dr esq etc ft gen gov hon inc jr lt ltd messrs mr mrs ms mt ph\\.d prof "
    "rd rep rev sen sgt sr st univ vs jan feb mar apr jun jul aug sept sep oct nov dec"
)
_WORD = re.compile(
    rf"""
      </?[a-z]\w*>                                                  # <person>
    | (?:[a-z]\.)+[a-z]\.(?:-\w+)* | (?:{_ABBREVIATIONS.replace(" ", "|")})\.(?![a-z]) # u.s., dr.
    | \b(?:nos?|fig)\.(?=\s*\d)                                   # no. 5, but "says no."
    | \b[a-z]\.(?![a-z]|\s+(?-i:An?|The|He|She|It|They)\b)        # j. smith, but "plan b. a man"
    | [a-z]+(?:\.[a-z]+)+                                          # a full stop without a space does not divide
    | (?-i:[A-Z]+(?:&[A-Z]+)+) | [\#@][a-z]\w*                     # at&t, #tag
    | \d+(?:[.,:/]\d+)+(?:-\w+)* | '\d+s\b | '(?:em|til|cause)\b  # 12:30, '90s
    | \w+(?:[-'/]\w+)* | [!?]{{2,}} | [^\w\s]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))$")
_IN_TWO = {
    "".join(parts): parts
    for parts in (p.split("|") for p in ("can|not", "gim|me", "gon|na", "got|ta", "lem|me", "wan|na", "y'|all"))
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset("'`.?!,:-;\"…–—‘’“”«»")


def caption_words(text: str) -> str:
    """Words of a caption in lower case, without punctuation, with a space between them.

    Brackets stay, as ``-lrb-`` and ``-rrb-``: the published evaluation means to drop them, but lower-cases them first and
    so misses them. Other signs than English ones (½, £, emoji) stay as they are, which Stanford's tokenizer rewrites.

    >>> caption_words("A man's dog doesn't run, it walks (on St. Mark's Square).")
    "a man 's dog does n't run it walks -lrb- on st. mark 's square -rrb-"
    """
    words: list[str] = []
    for token in _WORD.findall(text.replace("’", "'")):
        words += _divided(token.lower())
    return " ".join(words)


def _divided(token: str) -> list[str]:
    """A token as its words: none for punctuation, several for a contraction."""
    if token in _DROPPED:
        return []
    clitics: list[str] = []
    while (clitic := _CLITIC.search(token)) and clitic.start():
        token = token[: clitic.start()]
        clitics.insert(0, clitic.group())
    return [*_IN_TWO.get(token, [_BRACKETS.get(token, token)]), *clitics]


def bleu_4(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """BLEU with n-grams up to 4 over the whole corpus, 0 to 1; the closest reference's length counts.

    Source: Papineni et al., "BLEU", ACL 2002.

    Raises:
        DataError: if there are no examples, or one has no reference.
        MissingDependencyError: without `pycocoevalcap`.
    """
    scorer = _evaluator("bleu.bleu", "Bleu")(4)
    return float(_quiet(scorer.compute_score, *_tokenised(truth, found))[0][3])


def cider_d(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """CIDEr-D, 0 to 10; the figures of papers are 100 times this (1.38 is their 138).

    Words count by how rare they are among the references of these very examples: figures over different sets do not
    compare, and a single example has 0.

    Source: Vedantam et al., "CIDEr", CVPR 2015, §6 (the variant D clips counts and penalises lengths).

    Raises:
        DataError: if there are no examples, or no reference has a word.
        MissingDependencyError: without `pycocoevalcap`.
    """
    scorer = _evaluator("cider.cider", "Cider")()
    references, answers = _tokenised(truth, found)
    if not any(reference for of_one in references.values() for reference in of_one):
        raise DataError(
            "CIDEr-D weighs the words of the references, and none of them has a word; look at the data file"
        )
    return float(_quiet(scorer.compute_score, references, answers)[0])


def meteor(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """METEOR 1.5 for English, 0 to 1.

    Source: Denkowski and Lavie, "Meteor Universal", WMT 2014.

    Raises:
        MissingDependencyError: without Java or `pycocoevalcap`.
    """
    require_meteor()
    references, answers = _tokenised(truth, found)
    jar = _package("meteor.meteor") / "meteor-1.5.jar"
    lines = [" ||| ".join(["SCORE", *references[i], answers[i][0].replace("|||", "")]) for i in references]
    statistics = _run_meteor(jar, lines, len(lines))
    scores = _run_meteor(jar, [" ||| ".join(["EVAL", *statistics])], len(lines) + 1)
    return float(scores[-1])


def spice(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """SPICE, 0 to 1.

    Source: Anderson et al., "SPICE", ECCV 2016.

    Raises:
        MissingDependencyError: without Java (8 to 14: it uses a script engine that later ones lack), `pycocoevalcap`, or
            Stanford CoreNLP's files, which are not part of it.
    """
    require_spice()
    references, answers = _tokenised(truth, found)
    return float(_quiet(_evaluator("spice.spice", "Spice")().compute_score, references, answers)[0])


def require_package() -> None:
    """What BLEU-4 and CIDEr-D need is there.

    Raises:
        MissingDependencyError: if it is not.
    """
    _package("cider.cider")


def require_meteor() -> None:
    """What METEOR needs is there.

    Raises:
        MissingDependencyError: if it is not.
    """
    _require_java("METEOR")
    _package("meteor.meteor")


def require_spice() -> None:
    """What SPICE needs is there, but for the version of Java.

    Raises:
        MissingDependencyError: if it is not.
    """
    _require_java("SPICE")
    library = _package("spice.spice") / "lib"
    if not all((library / f"stanford-corenlp-3.6.0{part}.jar").exists() for part in ("", "-models")):
        raise MissingDependencyError(
            f"SPICE needs stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar in {library}; they come from "
            "Stanford's CoreNLP 3.6.0, and nothing is downloaded for you"
        )


def _tokenised(
    truth: Sequence[Sequence[str]], found: Sequence[str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and answers as the published scorers want them."""
    if not truth:
        raise DataError("metrics of captions need at least one example")
    references = {n: [caption_words(r) for r in refs] for n, refs in enumerate(truth)}
    if empty := [n for n, refs in references.items() if not refs]:
        raise DataError(f"example {empty[0]} has no reference caption to compare with")
    return references, {n: [caption_words(f)] for n, f in zip(references, found, strict=True)}


def _evaluator(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError as error:
        raise MissingDependencyError(f"metrics of captions need the package pycocoevalcap: {INSTALL}") from error


def _package(module: str) -> Path:
    _evaluator(module, "__name__")
    return Path(str(importlib.import_module(f"pycocoevalcap.{module}").__file__)).parent


def _quiet(compute: Callable[..., Any], *arguments: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return compute(*arguments)


def _require_java(metric: str) -> str:
    java = shutil.which("java")
    if java is None:
        raise MissingDependencyError(
            f"{metric} is a Java program, and there is no `java`: install a Java runtime (8 or newer)"
        )
    return java


def _run_meteor(jar: Path, lines: Sequence[str], expected: int) -> list[str]:
    """METEOR's answers to lines of its protocol, which ends with its input."""
    command = [_require_java("METEOR"), "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
    command += ["-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    text = "".join(f"{line}\n" for line in lines)
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, cwd=jar.parent, timeout=JAVA_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"METEOR had not scored {len(lines)} examples after {JAVA_TIMEOUT} seconds and was stopped; try fewer (limit=)"
        ) from error
    answers = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(answers) != expected:
        raise DataError(
            f"METEOR gave {len(answers)} answers where {expected} were expected (exit code {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    return answers


NEEDS: Mapping[str, Callable[[], None]] = {
    "BLEU-4": require_package,
    "CIDEr-D": require_package,
    "METEOR": require_meteor,
    "SPICE": require_spice,
}
METRICS: Mapping[str, Callable[[Sequence[Sequence[str]], Sequence[str]], float]] = {
    "BLEU-4": bleu_4,
    "CIDEr-D": cider_d,
    "METEOR": meteor,
    "SPICE": spice,
}
