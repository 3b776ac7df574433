"""Starting: Python, the library, torch, and the command line, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial

from benchmarks.speed.measuring import NotApplicableError, Sample, Setting, interleaved, seconds

MAIN = "import sys; from pituning.cli import main; main()"  # what the console script does
COMMANDS = {
    "bare Python": ["-c", "pass"],
    "import pituning": ["-c", "import pituning"],
    "import torch": ["-c", "import torch"],
    "pituning --help": ["-c", MAIN, "--help"],
}


def startup(setting: Setting) -> dict[str, Sample]:
    """Wall seconds from start to end of a process."""
    cases = {name: partial(seconds, partial(python, command)) for name, command in COMMANDS.items()}
    return {name: Sample.of(times) for name, times in interleaved(cases, setting.pick(30, 1)).items()}


def demo(setting: Setting) -> dict[str, Sample]:
    """Wall seconds of ``pituning demo`` and ``pituning demo --fast``, in an empty folder."""
    if not setting.demo:
        raise NotApplicableError("only with --demo")
    return {
        name: Sample.once(seconds(partial(_in_empty_folder, options)))
        for name, options in (("pituning demo --fast", ["--fast"]), ("pituning demo", []))
    }


def python(command: list[str], folder: str | None = None) -> None:
    """Run Python; raises where it fails."""
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True, cwd=folder)


def _in_empty_folder(options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        python(["-c", MAIN, "demo", *options], folder)
