"""Groups of options that several commands share: the data, the backbone, the pool, and where to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pituning.errors import ExpertError, PituningError, RefusedError

if TYPE_CHECKING:
    from pituning.backbones.base import Backbone
    from pituning.experts import Expert, ExpertPool
    from pituning.tasks import Task

TaskName = Annotated[
    str,
    typer.Argument(metavar="TASK", help="A built-in task such as sst2, or the name of your own.", show_default=False),
]
Method = Annotated[
    str,
    typer.Option(metavar="NAME", help="How the backbone is adapted: lora, bottleneck, prefix, prompt, ia3 or bitfit."),
]

TaskKind = Literal[
    "classification", "grounding", "vqa", "visual-entailment", "captioning", "image-classification", "summarisation",
    "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2",
]  # fmt: skip
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
PromptTypeName = Literal["none", "src", "prev_output"]

_DATA, _OWN_DATA, _MODEL, _SAVING = "Data", "Your own data", "Model", "Saving"


@dataclass(frozen=True)
class DataOptions:
    """Where a task's examples come from."""

    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of built-in tasks: TASK/train.tsv, TASK/test.tsv …", rich_help_panel=_DATA
        ),
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Use so many training examples per class, or in all where there are no classes.",
            rich_help_panel=_DATA,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Which examples are drawn, and their order in training.", rich_help_panel=_DATA),
    ] = 0
    train_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Training examples (.tsv, .csv, .jsonl).", rich_help_panel=_OWN_DATA),
    ] = None
    dev_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Examples that choose the best state of a run; not with --shots.",
            rich_help_panel=_OWN_DATA,
        ),
    ] = None
    test_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Test examples, likewise.", rich_help_panel=_OWN_DATA)
    ] = None
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VALUE=TEXT",
            help="A label value in the file and what it says in words, such as 'neg=a negative remark'; "
            "give it once for every value.",
            rich_help_panel=_OWN_DATA,
        ),
    ] = None
    text_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Column of the text, default 'text'; twice for pairs.", rich_help_panel=_OWN_DATA
        ),
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of the label value, default 'label'.", rich_help_panel=_OWN_DATA),
    ] = None
    task_kind: Annotated[
        TaskKind,
        typer.Option(
            help="What your files hold: texts with labels; or one of the paper's kinds, as a TSV in OFA's layout, or "
            "with a header. Grounding also takes the columns image, text, x0, y0, x1, y1.",
            rich_help_panel=_OWN_DATA,
        ),
    ] = "classification"
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="vqa, image-classification: the answers that may be given (OFA's .pkl, .json, or one a line).",
            rich_help_panel=_OWN_DATA,
        ),
    ] = None
    premise: Annotated[
        bool,
        typer.Option(
            "--premise", help="visual-entailment: read the picture's caption, too.", rich_help_panel=_OWN_DATA
        ),
    ] = False
    objects: Annotated[
        bool, typer.Option("--objects", help="vqa: read the detected objects, too.", rich_help_panel=_OWN_DATA)
    ] = False
    prompt_type: Annotated[
        PromptTypeName | None,
        typer.Option(
            help="What OFA's decoder reads before its answer: nothing, the source, or the source without its end; "
            "default: what OFA's own script has for the kind.",
            rich_help_panel=_OWN_DATA,
        ),
    ] = None

    def load(self, name: str) -> Task:
        """The task: from own files where they are given, otherwise the built-in one of that name."""
        from pituning.tasks import load_task

        if not self.own_files:
            self.require_files()
            return load_task(name, shots=self.shots, seed=self.seed, data=self.data)
        if self.shots is not None and self.dev_file is not None:
            raise typer.BadParameter("--dev-file: --shots include validation, so leave out one of the two")
        task = self._classification(name) if self.task_kind == "classification" else self._of_kind(name)
        return task if self.shots is None else task.few_shot(self.shots, self.seed)

    def require_files(self) -> None:
        """Raise if the user's own data are described, and there are no files of them."""
        if not self.own_files and (self._of_columns or self._of_kinds or self.task_kind != "classification"):
            given = [*self._of_columns, *map(_option, self._of_kinds)] or ["--task-kind"]
            raise typer.BadParameter(
                f"{', '.join(given)}: that describes your own data: add --train-file or --test-file"
            )

    @property
    def _of_columns(self) -> list[str]:
        """The options given that belong to files of labelled texts."""
        given = {"--labels": self.labels, "--text-column": self.text_column, "--label-column": self.label_column}
        return [option for option, value in given.items() if value]

    @property
    def _of_kinds(self) -> dict[str, Any]:
        """The options given that belong to one of the paper's kinds, by the names of their fields."""
        given = {
            "answers": self.answers,
            "premise": self.premise,
            "objects": self.objects,
            "prompt_type": self.prompt_type,
        }
        return {name: value for name, value in given.items() if value}

    @property
    def own_files(self) -> dict[str, Path]:
        """The user's own files by split."""
        files = {"train": self.train_file, "dev": self.dev_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}

    def _classification(self, name: str) -> Task:
        from pituning.tasks import task_from_files

        if self._of_kinds:
            raise typer.BadParameter(
                f"{', '.join(map(_option, self._of_kinds))}: not for files of labelled texts; see --task-kind"
            )
        return task_from_files(
            name,
            self.own_files,
            self._label_texts(),
            texts=self.text_column or ["text"],
            label=self.label_column or "label",
        )

    def _of_kind(self, name: str) -> Task:
        from pituning.tasks import KINDS, grounding_from_files, task_from_records
        from pituning.tasks.grounding import has_corner_columns

        if self._of_columns:
            raise typer.BadParameter(
                f"the columns of a {self.task_kind} file have fixed names or places: leave out {', '.join(self._of_columns)}"
            )
        closed = {"answers"} if self.task_kind in ("vqa", "image-classification") else set()
        known = {f.name for f in fields(KINDS[self.task_kind]())} | closed
        if wrong := [_option(name) for name in self._of_kinds if name not in known]:
            raise typer.BadParameter(f"{', '.join(wrong)}: not for {self.task_kind}")
        if self.task_kind == "grounding" and all(map(has_corner_columns, self.own_files.values())):
            return grounding_from_files(name, self.own_files)
        settings = {name: value for name, value in self._of_kinds.items() if name != "answers"}
        return task_from_records(name, KINDS[self.task_kind](**settings), self.own_files, answers=self.answers)

    def _label_texts(self) -> dict[str, str]:
        texts = dict(label.split("=", 1) for label in self.labels or () if "=" in label)
        if not texts or len(texts) < len(self.labels or ()) or not all(texts.values()):
            raise typer.BadParameter(
                "your own data need --labels VALUE=TEXT once for every label value, "
                "such as --labels 'neg=a negative remark' --labels 'pos=a positive remark'"
            )
        return texts


Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 …", rich_help_panel=_MODEL)]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the backbone's weights.", rich_help_panel=_MODEL)]
NoChat = Annotated[
    bool,
    typer.Option(
        "--no-chat", help="Decoder-only models: plain prompts, not the chat template's.", rich_help_panel=_MODEL
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The frozen backbone and where it runs."""

    backbone: Annotated[
        str,
        typer.Option(metavar="NAME", help="minilm, a local folder, or a Hugging Face id.", rich_help_panel=_MODEL),
    ] = "minilm"
    device: Device = "cpu"
    dtype: DtypeOption = "float32"
    no_chat: NoChat = False

    def load(self) -> Backbone:
        """Load the backbone."""
        import torch

        from pituning.backbones import load_backbone

        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PituningError(f"device {self.device!r} cannot be used here: {reason}") from error
        options: dict[str, Any] = {"chat": False} if self.no_chat else {}
        try:
            return load_backbone(self.backbone, device=self.device, dtype=getattr(torch, self.dtype), **options)
        except TypeError as error:
            if self.no_chat:
                raise PituningError(f"--no-chat is for decoder-only models, and {self.backbone!r} is none") from error
            raise


@dataclass(frozen=True)
class OptionalModelOptions:
    """A backbone for what needs one, by a verb that does without one as well."""

    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For all that needs a model: minilm, a local folder, or a Hugging Face id.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    device: Device = "cpu"
    dtype: DtypeOption = "float32"
    no_chat: NoChat = False

    def __post_init__(self) -> None:
        if self.backbone is None and (self.device, self.dtype, self.no_chat) != ("cpu", "float32", False):
            raise typer.BadParameter(
                "--device, --dtype and --no-chat say how a backbone is loaded: name it by --backbone"
            )

    def load(self) -> Backbone | None:
        """Load the backbone, if one is named."""
        if self.backbone is None:
            return None
        return ModelOptions(self.backbone, self.device, self.dtype, self.no_chat).load()


@dataclass(frozen=True)
class PoolOptions:
    """The folder of experts."""

    pool: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that holds the experts.")] = Path("experts")

    def open(self) -> ExpertPool:
        """The pool.

        Raises:
            PituningError: if there is no such folder.
        """
        from pituning.experts import ExpertPool

        if not self.pool.is_dir():
            raise PituningError(
                f"there is no pool {self.pool}: `pituning train TASK --pool {self.pool}` puts a first expert into it, "
                "--pool FOLDER names another"
            )
        return ExpertPool(self.pool)

    def expert(self, name: str) -> Expert:
        """An expert by its name in the pool, or by its folder."""
        from pituning.experts import Expert, ExpertPool

        pool = ExpertPool(self.pool)
        if name not in pool.names() and Path(name).is_dir():
            return Expert.load(name)
        return pool.load(name)


@dataclass(frozen=True)
class SaveOptions:
    """Where a new expert goes."""

    save: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the new expert in the pool.", rich_help_panel=_SAVING),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save into this folder, not into the pool.", rich_help_panel=_SAVING),
    ] = None

    def __post_init__(self) -> None:
        if self.save is not None and self.out is not None:
            raise typer.BadParameter("give either --save NAME or --out FOLDER, not both")

    def destination(self, pool: PoolOptions, default: str, *, task: str, method: str, blended: bool) -> Path:
        """The folder to save into; called before the work, so that nothing is trained that cannot be kept.

        An earlier expert is replaced only by one of its own kind: same task, same method, both blended or neither.

        Raises:
            PituningError: if the name cannot be that of a folder in a pool, or of a visible folder at all.
            RefusedError: if something else is in that place.
        """
        from pituning.experts import Expert
        from pituning.experts.expert import CONFIG_FILE, later_schema

        name = self.save if self.save is not None else default
        folder = pool.pool / name if self.out is None else self.out.resolve()
        if self.out is not None and (not folder.name or folder.name.startswith(".")):
            raise PituningError(
                f"--out {self.out}: an expert's folder needs a name without a leading dot, and {folder} has none"
            )
        if self.out is None and (not name or name.startswith(".") or Path(name).name != name):
            raise PituningError(
                f"{name!r} cannot be the name of an expert: no slash, no leading dot; choose one with --save NAME"
            )
        if not folder.exists():
            return folder
        if not (folder / CONFIG_FILE).is_file():
            raise RefusedError(f"{folder} exists and is no expert, so it is not replaced; choose another place")
        if later := later_schema(folder):
            raise RefusedError(
                f"{folder} holds an expert that a later version of pituning wrote (schema {later}), so it is not replaced; "
                "choose another name with --save NAME"
            )
        try:
            card = Expert.load(folder).card
        except ExpertError:
            return folder  # a broken expert is worth nothing
        if (card.task, card.method, bool(card.lineage)) != (task, method, blended):
            kind = f"{'blended ' if card.lineage else ''}{card.method} expert for {card.task or 'an unknown task'}"
            raise RefusedError(f"{folder} holds a {kind}, so it is not replaced; choose another name with --save NAME")
        return folder

    @staticmethod
    def write(expert: Expert, folder: Path) -> Path:
        """Save an expert under its folder's name."""
        from pituning.experts import ExpertPool

        return ExpertPool(folder.parent).add(expert, folder.name)


def _option(field: str) -> str:
    """The option that a field is given by."""
    return f"--{field.replace('_', '-')}"


def comma_separated(option: str, values: str | None) -> Sequence[str]:
    """The parts of ``a,b,c``; empty where the option is not given."""
    if values is None:
        return []
    parts = [part.strip() for part in values.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise typer.BadParameter(f"{option} expects different values with commas between them, not {values!r}")
    return parts
