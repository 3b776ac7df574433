"""The gallery: test pictures with what was asked, the true answer, and what was answered before and after.

Pictures are PNG data URIs at their own resolution, boxes are SVG over them, and the HTML needs neither JavaScript nor network.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from pituning.data.images import open_image
from pituning.errors import PituningError, RefusedError
from pituning.example import Box, Example
from pituning.metrics.boxes import THRESHOLD, intersection_over_union
from pituning.metrics.registry import metric_named
from pituning.report.style import INK, LINES, PI
from pituning.tasks.emoji import SceneRecords
from pituning.tasks.kind import LazyExamples
from pituning.tasks.task import Task

NAMED = "objects-named"
CHANGES: Mapping[str, tuple[str, str]] = {
    "better": ("▲", "got better"),
    "right": ("●", "stayed right"),
    "wrong": ("○", "stayed wrong"),
    "worse": ("▼", "got worse"),
    "unjudged": ("–", "not judged"),
}
"""What became of an item → its mark and its words."""

EMOJI_CREDITS = (
    "Emoji: Noto Emoji (Google Inc., Apache-2.0), Fluent Emoji (Microsoft Corporation, MIT) and Twemoji (Twitter, Inc. and "
    "other contributors, CC BY 4.0, creativecommons.org/licenses/by/4.0), reduced and put together."
)

_UPSCALED = 192  # pixels; pictures up to this side are shown at twice their size
_SOURCE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")
_HALO = "#ffffff"
_BEFORE, _AFTER = LINES[0], PI
_STROKES = {"truth": (INK, 3.5, ""), "before": (_BEFORE, 2.5, "6 4"), "after": (_AFTER, 2.5, "")}


@dataclass(frozen=True)
class Reply:
    """An answer as it is shown.

    Attributes:
        text: of a box, its overlap with the true one.
        right: None where the task has no right and wrong.
    """

    text: str
    box: Box | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Item:
    """One test picture.

    Attributes:
        picture: PNG as a data URI.
        size: its width and height in pixels.
    """

    id: str
    question: str
    picture: str
    size: tuple[int, int]
    truth: Reply
    before: Reply
    after: Reply

    @property
    def change(self) -> str:
        """A key of :data:`CHANGES`."""
        return change(self.before, self.after)


@dataclass(frozen=True)
class Gallery:
    """A sample of a task's test pictures; a notebook shows it as the report does.

    Attributes:
        before, after: who answered.
        rule: when an answer is right.
        counts: key of :data:`CHANGES` → how many of all test pictures.
        credits: whom the pictures are owed to.
    """

    task: str
    before: str
    after: str
    rule: str
    counts: Mapping[str, int]
    items: tuple[Item, ...]
    credits: str = ""

    def record(self) -> dict[str, Any]:
        """The gallery as JSON values; :func:`read_gallery` reads them."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return f"{STYLE}{gallery_html(self)}{_credits([self])}"


def make_gallery(
    task: Task,
    before: Sequence[tuple[Example, Any]],
    after: Sequence[tuple[Example, Any]],
    count: int = 12,
    *,
    names: tuple[str, str] = ("backbone alone", "π"),
) -> Gallery:
    """Choose pictures from what :func:`pituning.predict` answered to the same examples before and after.

    The sample is stratified by what became of the answers: each group has its share, rounded, and at least one picture if
    there are enough. Within a group the examples' ids decide, so that nobody picks.

    Args:
        count: pictures to show.
        names: who answered before, and after.

    Raises:
        RefusedError: if the two did not answer the same examples, or an example has no picture or no true answer.
    """
    if [e.id for e, _ in before] != [e.id for e, _ in after] or not before:
        raise RefusedError(f"a gallery of {task.name!r} needs answers to the same examples before and after")
    replies = [(_judged(task, e, b), _judged(task, e, a)) for (e, b), (_, a) in zip(before, after, strict=True)]
    changes = [change(*pair) for pair in replies]
    examples = [e for e, _ in before]
    chosen = sample(changes, [e.id for e in examples], count)
    items = tuple(_item(examples[n], *replies[n]) for n in chosen)
    found = Counter(changes)
    counts = {key: found[key] for key in CHANGES if found[key]}
    return Gallery(task.name, *names, _rule(task), counts, items, EMOJI_CREDITS if shows_scenes(task) else "")


def change(before: Reply, after: Reply) -> str:
    """What became of an answer, a key of :data:`CHANGES`."""
    if before.right is None or after.right is None:
        return "unjudged"
    return {(False, True): "better", (True, True): "right", (False, False): "wrong"}.get(
        (before.right, after.right), "worse"
    )


def sample(groups: Sequence[str], ids: Sequence[str], count: int) -> list[int]:
    """Positions of a stratified sample, group by group in the order of :data:`CHANGES`.

    Groups get their shares by largest remainder; then those that came away empty get one of the largest group's places, as
    long as it has more than one.

    >>> groups = ["right"] * 7 + ["better"] * 2 + ["worse"]
    >>> [groups[n] for n in sample(groups, list("abcdefghij"), 4)]
    ['better', 'right', 'right', 'worse']
    """
    members = {key: [n for n, group in enumerate(groups) if group == key] for key in CHANGES}
    members = {key: found for key, found in members.items() if found}
    count = min(count, len(groups))
    shares = {key: count * len(found) / len(groups) for key, found in members.items()}
    places = {key: int(share) for key, share in shares.items()}
    for key in sorted(shares, key=lambda k: places[k] - shares[k])[: count - sum(places.values())]:
        places[key] += 1
    for key in (k for k in places if not places[k]):
        largest = max(places, key=lambda k: places[k])
        if places[largest] > 1:
            places[largest], places[key] = places[largest] - 1, 1
    return [
        n
        for key, found in members.items()
        for n in sorted(found, key=lambda n: hashlib.sha256(ids[n].encode()).digest())[: places[key]]
    ]


def _judged(task: Task, example: Example, answer: Any) -> Reply:
    kind = metric_named(task.metric).answers
    if not example.target and not example.answers:
        raise RefusedError(f"example {example.id!r} has no true answer, so nothing in a gallery could be judged by it")
    if kind == "box":
        if example.box is None:
            raise RefusedError(
                f"example {example.id!r} has no box, but the metric of task {task.name!r} compares boxes"
            )
        if answer is None:
            return Reply("no box", None, False)
        if answer[0] >= answer[2] or answer[1] >= answer[3]:
            return Reply("empty box", None, False)
        overlap = intersection_over_union(example.box, answer)
        return Reply(f"overlap {overlap:.2f}", tuple(answer), overlap >= THRESHOLD)
    text = str(answer).strip()
    if kind == "soft":
        truth = dict(example.answers) or {example.target: 1.0}
        return Reply(text, None, metric_named(task.metric).compute([truth], [text]) >= 0.5)
    if kind == "choice":
        return Reply(text, None, text == example.target)
    if kind == "text":
        return Reply(text, None, metric_named(task.metric).compute([example.target], [text]) >= 0.5)
    if NAMED in task.more_metrics:
        references = [answer for answer, _ in example.answers] or [example.target]
        return Reply(text, None, metric_named(NAMED).compute([references], [text]) == 1)
    return Reply(text)


def _rule(task: Task) -> str:
    kind = metric_named(task.metric).answers
    if kind == "box":
        return f"A box is right if its overlap with the true one, intersection over union, is at least {THRESHOLD}."
    if kind == "references":
        named = "A caption is right if it names every thing in the picture, in whatever number."
        return named if NAMED in task.more_metrics else ""
    return "An answer is right if its confidence is at least one half." if kind == "soft" else ""


def _item(example: Example, before: Reply, after: Reply) -> Item:
    if example.image is None:
        raise RefusedError(f"example {example.id!r} has no picture, so there is nothing to show in a gallery")
    picture = open_image(example.image, example.id)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    truth = Reply("" if example.box else example.target or example.answers[0][0], example.box)
    question = " / ".join(text for text in example.texts if text) or example.prompt.strip()
    return Item(example.id, question, source, picture.size, truth, before, after)


def shows_scenes(task: Task) -> bool:
    """Whether a task's test pictures are emoji scenes."""
    examples = task.splits.get("test")
    return isinstance(examples, LazyExamples) and isinstance(examples.records, SceneRecords)


def read_gallery(record: Mapping[str, Any]) -> Gallery:
    """A gallery from what :meth:`Gallery.record` gave.

    Raises:
        PituningError: if a picture is anything but a PNG in the record itself: a report loads nothing.
    """
    items = tuple(
        Item(
            i["id"], i["question"], _checked(i["picture"], i["id"]), (int(i["size"][0]), int(i["size"][1])),
            *(_reply(i[part]) for part in ("truth", "before", "after")),
        )
        for i in record["items"]
    )  # fmt: skip
    counts = {key: int(record["counts"][key]) for key in CHANGES if key in record["counts"]}
    task, before, after, rule = (str(record[key]) for key in ("task", "before", "after", "rule"))
    return Gallery(task, before, after, rule, counts, items, str(record.get("credits") or ""))


def _reply(record: Mapping[str, Any]) -> Reply:
    box = record.get("box")
    corners = None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return Reply(str(record["text"]), corners, record.get("right"))


def _checked(source: object, name: str) -> str:
    if not isinstance(source, str) or not _SOURCE.fullmatch(source):
        raise PituningError(
            f"gallery, example {name!r}: expected the picture as data:image/png;base64,…, found {str(source)[:40]!r}"
        )
    return source


def galleries_html(galleries: Sequence[Gallery]) -> str:
    """The section of the report: all galleries, each below its caption."""
    parts = [f"<h3>{escape(g.task)}</h3>\n{gallery_html(g)}" for g in galleries]
    return "\n".join([STYLE, *parts, _credits(galleries)])


def gallery_html(gallery: Gallery) -> str:
    """One gallery with its caption and its legend."""
    total = sum(gallery.counts.values())
    shown = Counter(item.change for item in gallery.items)
    counts = ", ".join(f"{n:,} {CHANGES[key][1]} ({shown[key]} shown)" for key, n in gallery.counts.items())
    boxes = any(item.truth.box for item in gallery.items)
    caption = (
        f"<b>Before</b>: {escape(gallery.before)}. <b>After</b>: {escape(gallery.after)}. Of {total:,} test pictures "
        f"{counts}: drawn by lot, each group by its share, but at least one. {escape(gallery.rule)}"
    )
    legend = f'<p class="note keys">{_key("truth", "true box")}{_key("before", "before")}{_key("after", "after")}</p>'
    cards = "\n".join(_card(item) for item in gallery.items)
    width = max((_shown(item)[0] for item in gallery.items), default=_UPSCALED)
    return (
        f'<div class="gallery"><p class="note">{caption}</p>{legend if boxes else ""}\n'
        f'<div class="items" style="--width: {width}px">\n{cards}\n</div></div>'
    )


def _card(item: Item) -> str:
    mark, words = CHANGES[item.change]
    width, height = _shown(item)
    style = ' class="pixels"' if width > item.size[0] else ""
    asked = f"“{item.question}”" if item.truth.box else item.question
    rows = "" if item.truth.box else _row("true", item.truth)
    rows += _row("before", item.before) + _row("after", item.after)
    return (
        f'<figure class="item {item.change}"><p class="change"><span aria-hidden="true">{mark}</span> {words}</p>\n'
        f'<div class="picture"><img{style} src="{escape(item.picture)}" width="{width}" height="{height}" '
        f'alt="{escape(_described(item))}">{_boxes(item)}</div>\n'
        f"<figcaption><b>{escape(asked)}</b><dl>{rows}</dl></figcaption></figure>"
    )


def _row(name: str, reply: Reply) -> str:
    mark, word = ("✓", "right") if reply.right else ("✗", "wrong")
    verdict = "" if reply.right is None else f'<span role="img" aria-label="{word}" title="{word}">{mark}</span>'
    text = escape(reply.text) if reply.text else "<i>nothing</i>"
    return f'<div><dt>{name}</dt><dd class="verdict">{verdict}</dd><dd>{text}</dd></div>'


def _described(item: Item) -> str:
    """What the picture shows, for those who do not see it."""
    width, height = item.size
    parts = [f"Test picture of {width} × {height} pixels, asked: {item.question}."]
    for name, reply in (("True answer", item.truth), ("Before", item.before), ("After", item.after)):
        said = [reply.text or ("" if reply.box else "nothing")]
        if reply.box:
            x0, y0, x1, y1 = (f"{value:.0f}" for value in reply.box)
            said.append(f"box from {x0}, {y0} to {x1}, {y1}")
        if reply.right is not None:
            said.append("right" if reply.right else "wrong")
        parts.append(f"{name}: {', '.join(filter(None, said))}.")
    return " ".join(parts)


def _boxes(item: Item) -> str:
    """The boxes as lines of equal width whatever the picture's scale, each with a white edge that any background shows."""
    lines = "".join(
        _line("rect", key, f'x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"')
        for key, reply in (("truth", item.truth), ("before", item.before), ("after", item.after))
        if reply.box
        for x0, y0, x1, y1 in [reply.box]
    )
    return f'<svg viewBox="0 0 {item.size[0]} {item.size[1]}" aria-hidden="true">{lines}</svg>' if lines else ""


def _line(tag: str, key: str, place: str) -> str:
    colour, width, dashes = _STROKES[key]
    look = 'fill="none" vector-effect="non-scaling-stroke"'
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<{tag} {place} {look} stroke="{_HALO}" stroke-opacity=".75" stroke-width="{width + 2:g}"/>'
        f'<{tag} class="{key}" {place} {look} stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
    )


def _key(key: str, name: str) -> str:
    line = _line("path", key, 'd="M2 6H34"')
    return f'<span><svg width="36" height="12" viewBox="0 0 36 12" aria-hidden="true">{line}</svg> {name}</span>'


def _shown(item: Item) -> tuple[int, int]:
    scale = 2 if max(item.size) <= _UPSCALED else 1
    return scale * item.size[0], scale * item.size[1]


def _credits(galleries: Sequence[Gallery]) -> str:
    given = dict.fromkeys(escape(g.credits) for g in galleries if g.credits)
    return "".join(f'\n<p class="note">{line}</p>' for line in given)


STYLE = """<style>
.gallery .items { display: grid; gap: 14px; margin: 10px 0 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--width) + 26px)), 1fr)); }
.gallery .item { margin: 0; padding: 8px 12px 10px; border: 1px solid var(--line, #e4e7eb); border-radius: 8px;
  background: var(--paper, white); color: var(--ink, #1f2933); break-inside: avoid; font-size: .92rem; }
.gallery .change { margin: 0 0 6px; font-weight: 600; color: var(--soft, #52606d); }
.gallery .picture { position: relative; width: fit-content; max-width: 100%; margin: 0 auto 8px; line-height: 0; }
.gallery .picture img { max-width: 100%; height: auto; border-radius: 3px; }
.gallery .pixels { image-rendering: crisp-edges; image-rendering: pixelated; }
.gallery .picture svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.gallery figcaption { overflow-wrap: anywhere; line-height: 1.4; }
.gallery dl { margin: 6px 0 0; } .gallery dl div { display: grid; grid-template-columns: 4em 1.4em 1fr; }
.gallery dt { color: var(--soft, #52606d); } .gallery dd { margin: 0; }
.gallery .verdict { font-weight: 700; }
.gallery .keys span { margin-right: 18px; white-space: nowrap; } .gallery .keys svg { vertical-align: -1px; }
@media print { .gallery > .note, h3 { break-after: avoid; break-inside: avoid; } .gallery .items { --width: 150px !important; }
  .gallery .picture { max-width: 150px; } .gallery .item { font-size: .8rem; } }
</style>"""
"""Looks right on a page without the report's colours, too."""
