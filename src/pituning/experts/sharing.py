"""Experts go to a hub repository, or to a folder in its place, and come back proven."""

from __future__ import annotations

import shutil
from pathlib import Path

from pituning.errors import ExpertError
from pituning.experts.expert import Expert
from pituning.experts.pool import ExpertPool

_FILES = ["*.json", "*.safetensors", "*.md"]


def push(pool: ExpertPool, name: str, target: str | Path, *, private: bool = False) -> str:
    """Copy an expert of a pool, with its embedding where it has one, into a repository of experts.

    Args:
        target: a folder (anything that starts with ``.``, ``/`` or ``~``, or exists), or the id of a hub repository, which is
            made if there is none. The expert is a sub-folder there, of its own name; in a hub repository, which keeps what was
            there before as a revision, it takes the place of one of that name.
        private: of a repository that is made.

    Returns:
        where it now is.

    Raises:
        ExpertError: if the expert is broken, the folder has one of that name, or the hub refuses.
    """
    pool.load(name).verify()
    source = pool.folder / name
    if (folder := _local(target)) is not None:
        require_new(ExpertPool(folder), name)
        expert = ExpertPool(folder).add(pool.load(name))
        for extra in source.iterdir():
            if not (expert / extra.name).exists():
                shutil.copy2(extra, expert / extra.name)
        return str(expert)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(str(target), private=private, exist_ok=True)
        api.upload_folder(
            repo_id=str(target),
            folder_path=source,
            path_in_repo=name,
            allow_patterns=_FILES,
            delete_patterns=_FILES,  # or an embedding of an earlier version would stay beside the new tensors
            commit_message=f"Expert {name}",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ExpertError(f"expert {name!r} could not be pushed to {target}: {error}") from error
    return f"{target}/{name}"


def pull(source: str | Path, pool: ExpertPool, name: str, *, revision: str | None = None) -> Expert:
    """Copy an expert out of a repository of experts into a pool.

    Args:
        source: a folder or hub repository that :func:`push` wrote into.
        revision: of a hub repository: a branch, tag or commit.

    Raises:
        ExpertError: if there is no such expert, the pool has one of that name, or what came is not what was pushed.
    """
    require_new(pool, name)
    folder = _local(source)
    if folder is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        patterns = [f"{name}/{pattern}" for pattern in _FILES]
        try:
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise ExpertError(f"{source} could not be fetched from the hub: {error}") from error
    found = ExpertPool(folder)
    expert = found.load(name)
    saved = pool.add(expert)
    for extra in (folder / name).iterdir():
        if not (saved / extra.name).exists():
            shutil.copy2(extra, saved / extra.name)
    return pool.load(name)


def require_new(pool: ExpertPool, name: str) -> None:
    """Raise if a pool has an expert of that name already: what comes from elsewhere replaces nothing."""
    if name in pool.names():
        raise ExpertError(f"pool {pool.folder} has an expert {name!r} already; remove or rename it first")


def _local(place: str | Path) -> Path | None:
    """The folder that a place is, or ``None`` for the id of a hub repository."""
    path = Path(place).expanduser()
    if isinstance(place, Path) or path.is_dir() or str(place).startswith((".", "/", "~")) or str(place).count("/") != 1:
        return path
    return None
