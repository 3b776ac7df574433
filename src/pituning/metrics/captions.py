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

_WORD = re.compile(r"[a-z]\.(?:[a-z]\.)+|\d+(?:[.,:/]\d+)+|\w+(?:[-'/]\w+)*|[^\w\s]")
_CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))$")
_DROPPED = frozenset("'`.?!,:-;()[]{}\"…–—‘’“”")


def caption_words(text: str) -> str:
    """Words of a caption in lower case, without punctuation, with a space between them.

    >>> caption_words("A man's dog doesn't run, it walks.")
    "a man 's dog does n't run it walks"
    """
    words: list[str] = []
    for token in _WORD.findall(text.lower().replace("’", "'")):
        if token in _DROPPED:
            continue
        if token == "cannot":
            words += ["can", "not"]
        elif clitic := _CLITIC.search(token):
            words += [part for part in (token[: clitic.start()], clitic.group()) if part]
        else:
            words.append(token)
    return " ".join(words)


def bleu_4(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """BLEU with n-grams up to 4 over the whole corpus, 0 to 1; the closest reference's length counts.

    Source: Papineni et al., "BLEU", ACL 2002.
    """
    scorer = _evaluator("bleu.bleu", "Bleu")(4)
    return float(_quiet(scorer.compute_score, *_tokenised(truth, found))[0][3])


def cider_d(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """CIDEr-D, 0 to 10; the figures of papers are 100 times this (1.38 is their 138).

    Words count by how rare they are among the references of these very examples: figures over different sets do not
    compare, and a single example has 0.

    Source: Vedantam et al., "CIDEr", CVPR 2015, §6 (the variant D clips counts and penalises lengths).
    """
    scorer = _evaluator("cider.cider", "Cider")()
    return float(_quiet(scorer.compute_score, *_tokenised(truth, found))[0])


def meteor(truth: Sequence[Sequence[str]], found: Sequence[str]) -> float:
    """METEOR 1.5 for English, 0 to 1.

    Source: Denkowski and Lavie, "Meteor Universal", WMT 2014.

    Raises:
        MissingDependencyError: without Java or `pycocoevalcap`.
    """
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
        MissingDependencyError: without Java, `pycocoevalcap`, or Stanford CoreNLP's files, which are not part of it.
    """
    _require_java("SPICE")
    library = _package("spice.spice") / "lib"
    if len(list(library.glob("stanford-corenlp-3.6.0*.jar"))) < 2:
        raise MissingDependencyError(
            f"SPICE needs stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar in {library}; they come from "
            "Stanford's CoreNLP 3.6.0, and nothing is downloaded for you"
        )
    references, answers = _tokenised(truth, found)
    return float(_quiet(_evaluator("spice.spice", "Spice")().compute_score, references, answers)[0])


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
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, cwd=jar.parent, timeout=JAVA_TIMEOUT, check=False
    )
    answers = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(answers) != expected:
        raise DataError(
            f"METEOR gave {len(answers)} answers where {expected} were expected (exit code {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    return answers


METRICS: Mapping[str, Callable[[Sequence[Sequence[str]], Sequence[str]], float]] = {
    "BLEU-4": bleu_4,
    "CIDEr-D": cider_d,
    "METEOR": meteor,
    "SPICE": spice,
}
