"""`pituning pool`: list, show, verify, audit."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pituning.cli.options import DataOptions, ModelOptions, PoolOptions, TaskName
from pituning.cli.output import Output, table
from pituning.cli.verb import verb
from pituning.errors import ExpertError

if TYPE_CHECKING:
    from pituning.data.overlap import Overlap
    from pituning.experts import ExpertCard

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
        [name, c.task, c.method, "all" if c.shots is None else str(c.shots), f"{c.parameters:,}", c.backbone]
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
        ("trained on", f"{_shots(card)}, seed {card.seed}" if card.shots is not None else "all examples"),
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


def _shots(card: ExpertCard) -> str:
    return f"{card.shots} per class" if card.shots_per_class else f"{card.shots} examples"


@pool_app.command("verify")
@verb
def verify(
    pool: PoolOptions,
    output: Output,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also prove that every expert fits this backbone (minilm, a folder, an id)."),
    ] = None,
) -> None:
    """Check every expert of a pool; exit code 1 if any is broken, and all of them are listed.

    Example: pituning pool verify --backbone minilm
    """
    with output.status(f"verifying {pool.pool}"):
        experts = pool.open()
        report = experts.verify(ModelOptions(backbone).load() if backbone is not None else None)
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
