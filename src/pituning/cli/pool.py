"""`pituning pool`: list, show, verify, audit, search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pituning.cli.options import DataOptions, OptionalModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.rank import Reference
from pituning.cli.verb import verb
from pituning.errors import ExpertError

if TYPE_CHECKING:
    from rich.console import Group

    from pituning.data.overlap import Overlap
    from pituning.experts import ExpertCard
    from pituning.similarity.search import Hit

pool_app = typer.Typer(no_args_is_help=True)


@pool_app.command("list")
@verb
def list_experts(pool: PoolOptions, output: Output) -> None:
    """List the experts of a pool.

    Example: pituning pool list --pool experts
    """
    cards: dict[str, ExpertCard | None] = {}
    with output.status(f"reading {pool.pool}"):
        experts = pool.open()
        for name in experts.names():
            try:
                cards[name] = experts.load(name).card
            except ExpertError:
                cards[name] = None
    broken = sum(card is None for card in cards.values())
    rows = [
        [name, c.task, c.method, _all(c, "all") if c.shots is None else str(c.shots), f"{c.parameters:,}", c.backbone]
        if c is not None
        else [name, "broken", "", "", "", ""]
        for name, c in cards.items()
    ]
    output.result(
        {
            "pool": pool.pool,
            "experts": [{**(asdict(c) if c else {}), "name": n, "broken": c is None} for n, c in cards.items()],
        },
        table(f"Pool {pool.pool}", ["expert", "task", "method", "shots#", "parameters#", "backbone"], rows),
        f"{len(rows)} expert{'s' * (len(rows) != 1)}"
        + (f", {broken} broken: see pituning pool verify" if broken else ""),
    )


@pool_app.command("show")
@verb
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name in the pool, or a folder.", show_default=False)],
    pool: PoolOptions,
    output: Output,
) -> None:
    """Show what is known of one expert: task, backbone, figures, and what it was blended from.

    Example: pituning pool show sst2-pi
    """
    with output.status(f"reading {name}"):
        expert = pool.expert(name)
    card = expert.card
    facts = [
        ("task", card.task),
        ("method", card.method),
        ("backbone", f"{card.backbone} {card.fingerprint}".strip()),
        ("trained on", f"{_shots(card)}, seed {card.seed}" if card.shots is not None else _all(card, "all examples")),
        ("licence", card.licence),
        ("parameters", f"{card.parameters:,} in {len(expert.tensors)} tensors"),
        ("answers", "; ".join(card.choices)),
        *((metric, f"{value:.4f}") for metric, value in card.metrics.items()),
        *(("blended from", f"{parent['name']}, weight {parent['weight']:.3f}") for parent in card.lineage),
        ("learning rate", f"{card.training['learning_rate']:g}" if "learning_rate" in card.training else ""),
        ("steps", str(card.training.get("steps_taken", card.training.get("steps", "")))),
    ]
    shapes = {key: list(tensor.shape) for key, tensor in expert.tensors.items()}
    output.result(
        {**asdict(card), "tensors": shapes},
        table(f"Expert {card.name}", ["", ""], [[fact, value] for fact, value in facts if value]),
    )


def _all(card: ExpertCard, said: str) -> str:
    """What is said of an expert trained on all examples; nothing where the card records no training, as of a merged one."""
    return said if "examples" in card.training else ""


def _shots(card: ExpertCard) -> str:
    return f"{card.shots} per class" if card.shots_per_class else f"{card.shots} examples"


@pool_app.command("verify")
@verb
def verify(
    pool: PoolOptions,
    output: Output,
    model: OptionalModelOptions,
) -> None:
    """Check every expert of a pool; exit code 1 if any is broken, and all of them are listed.

    With --backbone, also prove that every expert fits it.

    Example: pituning pool verify --backbone minilm
    """
    with output.status(f"verifying {pool.pool}"):
        experts = pool.open()
        report = experts.verify(model.load())
    broken = sum(bool(problem) for problem in report.values())
    output.result(
        {
            "pool": pool.pool,
            "broken": broken,
            "experts": [{"name": name, "problem": problem or None} for name, problem in report.items()],
        },
        table(f"Pool {pool.pool}", ["expert", "state"], [[n, problem or "ok"] for n, problem in report.items()]),
        f"{broken} of {len(report)} experts broken" if broken else f"all {len(report)} experts ok",
    )
    if broken:
        raise typer.Exit(1)


@pool_app.command("audit")
@verb
def audit(task: TaskName, source: DataOptions, pool: PoolOptions, output: Output) -> None:
    """Look for sentences of a task that the experts of a pool were trained on; figures over those are worth nothing.

    Example: pituning pool audit sst2
    """
    target = source.load(task)
    with output.status(f"comparing {task} with the training data of {pool.pool}"):
        from pituning.similarity.select import audit_pool

        experts = pool.open()
        report = audit_pool(experts, target, data=source.data)
        tasks = {name: experts.load(name).card.task for name in report}
    output.result(
        {
            "task": task,
            "pool": pool.pool,
            "experts": [{"name": n, "task": tasks[n], **_finding(found)} for n, found in report.items()],
        },
        table(
            f"Overlaps of {task} with what the experts were trained on",
            ["expert", "task", "overlaps#", "the most similar pair"],
            [[n, tasks[n], *_summary(found, tasks[n] == task)] for n, found in report.items()],
        ),
    )


@pool_app.command("search")
@verb
def search(
    pool: PoolOptions,
    output: Output,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="TASK|EXPERT", help="Those most like this expert, or like the experts for this task, first."
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only experts on this backbone: its id, short name or fingerprint."),
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="Only experts of this method.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", metavar="ID", help="Only experts under this licence: mit …")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME>=X", help="Only experts whose card has such a metric; more than once for several."),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many experts.")] = 10,
    reference: Annotated[
        Reference, typer.Option(help="Which embeddings: all made at one shared expert, or each at its own.")
    ] = "shared",
) -> None:
    """Find experts by what their cards say and by how like they are to a task or to another expert.

    The pool keeps an index for it, in which only new and changed experts are read again.

    Example: pituning pool search --like sst2 --method lora --metric 'accuracy>=0.8' --pool experts
    """
    with output.status(f"reading the index of {pool.pool}"):
        from pituning.similarity.index import open_index
        from pituning.similarity.search import MetricBound, Wanted, search_pool

        wanted = Wanted(backbone, method, licence, tuple(MetricBound.parse(bound) for bound in metric or ()))
        index = open_index(pool.open())
    found = search_pool(index, like, wanted, top=top, reference=reference)
    if not index.saved:
        output.note(f"note: the index could not be stored in {pool.pool}; the next search makes it again")
    heading = f"Experts like {like}, by fisher-cosine ({reference})" if like is not None else f"Experts of {pool.pool}"
    output.result(
        {
            "pool": pool.pool,
            "experts": [{**_searchable(hit.card), "similarity": hit.similarity} for hit in found.hits],
            "like": found.like, "matching": found.matching, "incomparable": found.incomparable,
            "problems": found.problems, "read": index.read,
        },
        *_hits_table(heading, found.hits),
        f"{found.matching:,} of {len(index.entries):,} experts match"
        + (f", {found.incomparable:,} of them have no embedding to compare" if found.incomparable else ""),
        *(f"broken: {name}: {why}" for name, why in found.problems.items()),
    )  # fmt: skip


def _hits_table(title: str, hits: Sequence[Hit]) -> list[Group | str]:
    """The experts that were found; what all of them have in common is said in a line below."""
    columns: dict[str, list[str]] = {"expert": [hit.card.name for hit in hits]}
    if any(hit.similarity is not None for hit in hits):
        columns["similarity#"] = [f"{hit.similarity:.4f}" for hit in hits]
    columns["task"] = [hit.card.task for hit in hits]
    columns["metrics"] = [", ".join(f"{name} {value:.4g}" for name, value in hit.card.metrics.items()) for hit in hits]
    common = []
    for fact in ("method", "licence", "backbone"):
        values = [str(getattr(hit.card, fact)) for hit in hits]
        if len(set(values)) > 1:
            columns[fact] = [value.rpartition("/")[2] for value in values]
        elif any(values):
            common.append(f"{fact} {values[0]}")
    rows = list(zip(*columns.values(), strict=True))
    return [table(title, list(columns), rows), *([f"all of them: {', '.join(common)}"] if common else [])]


def _searchable(card: ExpertCard) -> dict[str, Any]:
    """What the index holds of a card."""
    return {key: value for key, value in asdict(card).items() if key not in ("choices", "training")}


def _finding(found: list[Overlap] | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"overlaps": None, "problem": found}
    return {"overlaps": [asdict(o) for o in found], "problem": None}


def _summary(found: list[Overlap] | str, same_task: bool) -> list[str]:
    if isinstance(found, str):
        return ["unknown", found]
    if same_task:
        return [str(len(found)), "an expert for the task itself: rank and interpolate leave it out"]
    pair = f"{found[0].left_text}\n{found[0].right_text} ({found[0].right})" if found else ""
    return [str(len(found)), pair]
