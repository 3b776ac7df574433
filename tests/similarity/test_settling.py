"""A Fisher estimate that stops when it rests, goes on where it stopped, and is the same from any number of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError
from pituning.similarity import settling
from pituning.similarity.fisher import FisherEstimate, fisher_diagonal
from pituning.similarity.settling import PARTIAL_FILE, fisher_across_processes, settled_fisher

ROOT = Path(__file__).parents[2]


def same(found: FisherEstimate, expected: FisherEstimate, tolerance: float = 1e-12) -> None:
    assert found.samples == expected.samples
    assert found.loss == pytest.approx(expected.loss, rel=max(1e-12, tolerance))
    for half in ("even", "odd"):
        for key, tensor in getattr(expected, half).items():
            error = (getattr(found, half)[key] - tensor).norm() / tensor.norm().clamp_min(1e-30)
            assert error <= tolerance, (half, key)


def fixed(*names: str) -> Any:
    return lambda fisher: names


def test_stops_two_doublings_after_the_ranking_came_to_rest(
    backbone_of: Any, random_expert: Any, random_examples: Any
) -> None:
    backbone = backbone_of("encoder", torch.float64)
    expert, examples = random_expert(backbone, "lora", 1), random_examples(64, 1)
    found = settled_fisher(backbone, expert, examples, fixed("a", "b"), first=4, agreement=-1.0)
    assert list(found.history) == [4, 8, 16]
    assert found.settled
    same(found.estimate, fisher_diagonal(backbone, expert, examples[:16]))
    turns = iter(["ab", "ba", "ba", "ba", "ab"])
    found = settled_fisher(backbone, expert, examples, lambda fisher: next(turns), first=2, agreement=-1.0)
    assert list(found.history) == [2, 4, 8, 16]
    assert [r for r, _ in found.history.values()] == [("a", "b"), ("b", "a"), ("b", "a"), ("b", "a")]


def test_goes_on_while_the_halves_disagree_and_ends_with_the_examples(
    bert: Backbone, random_expert: Any, random_examples: Any
) -> None:
    expert, examples = random_expert(bert, "lora", 1), random_examples(11, 1)
    found = settled_fisher(bert, expert, examples, fixed("a"), first=2, agreement=2.0)
    assert list(found.history) == [2, 4, 8, 11]
    assert not found.settled
    assert settled_fisher(bert, expert, examples, fixed("a"), first=64).estimate.samples == 11
    assert settled_fisher(bert, expert, examples, fixed("a"), first=2, most=5, agreement=2.0).estimate.samples == 5
    with pytest.raises(DataError, match="no examples"):
        settled_fisher(bert, expert, [], fixed("a"))


class TestResuming:
    def test_what_was_summed_is_not_summed_again(
        self, backbone_of: Any, random_expert: Any, random_examples: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        backbone = backbone_of("encoder", torch.float64)
        expert, examples = random_expert(backbone, "lora", 1), random_examples(32, 1)
        expected = settled_fisher(backbone, expert, examples, fixed("a"), first=4, agreement=2.0)
        seen: list[int] = []

        def counted(*arguments: Any, **options: Any) -> FisherEstimate:
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(len(arguments[2]))
            return fisher_diagonal(*arguments, **options)

        monkeypatch.setattr(settling, "fisher_diagonal", counted)
        with pytest.raises(KeyboardInterrupt):
            settled_fisher(backbone, expert, examples, fixed("a"), first=4, agreement=2.0, folder=tmp_path)
        assert seen == [4, 4]
        monkeypatch.setattr(
            settling, "fisher_diagonal", lambda *a, **o: (seen.append(len(a[2])), fisher_diagonal(*a, **o))[1]
        )
        found = settled_fisher(backbone, expert, examples, fixed("a"), first=4, agreement=2.0, folder=tmp_path)
        assert seen == [4, 4, 8, 16]
        same(found.estimate, expected.estimate)

    @pytest.mark.parametrize("change", ["expert", "labels", "examples", "file"])
    def test_but_not_of_something_else(
        self, bert: Backbone, random_expert: Any, random_examples: Any, tmp_path: Path, change: str
    ) -> None:
        def run(expert: Any, examples: Any, labels: str) -> FisherEstimate:
            return settled_fisher(
                bert, expert, examples, fixed("a"), first=4, agreement=2.0, labels=labels, folder=tmp_path
            ).estimate

        expert, examples = random_expert(bert, "lora", 1), random_examples(8, 1)
        run(expert, examples, "true")
        other = {
            "expert": (random_expert(bert, "lora", 2), examples, "true"), "labels": (expert, examples, "model"),
            "examples": (expert, random_examples(8, 2), "true"), "file": (expert, examples, "true"),
        }[change]  # fmt: skip
        if change == "file":
            (tmp_path / PARTIAL_FILE).write_bytes(b"broken")
        same(run(*other), fisher_diagonal(bert, other[0], other[1], labels=other[2]), 1e-5)


SHARE = """
import json, sys
sys.path.insert(0, {root!r})
import torch
from tests.conftest import build_bert
from pituning.example import Example
from pituning.experts import Expert, ExpertCard
from pituning.methods import config_dict, initial_tensors, make_config
from pituning.similarity.settling import fisher_across_processes
backbone = build_bert(torch.float64)
config = config_dict(make_config("lora", backbone, r=3))
torch.manual_seed(5)
tensors = {{k: t + 0.1 * torch.randn_like(t) for k, t in initial_tensors(backbone, config).items()}}
choices = ("ba", "de fi")
texts = [f"go ku {{'la ' * n}}mi" for n in range({count})]
examples = [Example(str(n), (text,), text, choices[n % 2], choices) for n, text in enumerate(texts)]
found = fisher_across_processes(backbone, Expert(tensors, config, ExpertCard("one")), examples, batch_size=3)
sums = {{h: {{k: t.flatten().tolist() for k, t in getattr(found, h).items()}} for h in ("even", "odd")}}
print(json.dumps({{"sums": sums, "samples": found.samples, "loss": found.loss}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [7, 1])
def test_any_number_of_processes_gives_the_same(count: int) -> None:
    """Two processes of 7 examples, and of one: then one of them has none."""
    alone = outputs(1, count)[0]
    for found in outputs(2, count):
        assert found["samples"] == alone["samples"] == count
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        for half, sums in alone["sums"].items():
            for key, values in sums.items():
                torch.testing.assert_close(
                    torch.tensor(found["sums"][half][key]), torch.tensor(values), rtol=1e-9, atol=1e-15
                )


def outputs(processes: int, count: int) -> list[Mapping[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }  # fmt: skip
        code = SHARE.format(root=str(ROOT), count=count)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    found = []
    for process in started:
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, error[-2000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_in_one_process_it_is_the_plain_estimate(bert: Backbone, random_expert: Any, random_examples: Any) -> None:
    expert, examples = random_expert(bert, "lora", 1), random_examples(6, 1)
    same(fisher_across_processes(bert, expert, examples), fisher_diagonal(bert, expert, examples))


class TestPrecisionAndMemory:
    @pytest.mark.parametrize("method", ["lora", "ia3"])
    def test_half_precision_is_summed_in_full(self, method: str, fresh_bert_of: Any, random_examples: Any) -> None:
        """The half-precision model's own gradients, one example at a time, summed in float64."""
        from pituning.experts import Expert, ExpertCard
        from pituning.methods import attached, config_dict, initial_tensors, make_config

        backbone = fresh_bert_of(torch.bfloat16)
        config = config_dict(make_config(method, backbone))
        torch.manual_seed(1)
        tensors = {k: t + 0.2 * torch.randn_like(t) for k, t in initial_tensors(backbone, config).items()}
        expert, examples = Expert(tensors, config, ExpertCard("half")), random_examples(5, 1)
        found = fisher_diagonal(backbone, expert, examples, batch_size=1).mean()
        slow: dict[str, Tensor] = {}
        with attached(backbone, config, tensors) as site:
            for example in examples:
                loss = backbone.loss(backbone.collate([example]))[0]
                gradients = torch.autograd.grad(loss, list(site.parameters.values()))
                for key, gradient in zip(site.parameters, gradients, strict=True):
                    slow[key] = slow.get(key, torch.zeros(gradient.shape).double()) + gradient.double() ** 2 / 5
        for key, expected in slow.items():
            assert found[key].dtype == torch.float64
            assert (found[key] - expected).norm() <= 0.03 * expected.norm(), key  # the loop sums positions in bfloat16

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit", "ia3"])
    def test_under_gradient_checkpointing_it_is_the_same(
        self, method: str, reentrant: bool, fresh_bert_of: Any, random_examples: Any
    ) -> None:
        from pituning.experts import Expert, ExpertCard
        from pituning.methods import config_dict, initial_tensors, make_config

        backbone = fresh_bert_of(torch.float64)
        config = config_dict(make_config(method, backbone))
        torch.manual_seed(1)
        tensors = {k: t + 0.2 * torch.randn_like(t) for k, t in initial_tensors(backbone, config).items()}
        expert, examples = Expert(tensors, config, ExpertCard("one")), random_examples(6, 1)
        expected = fisher_diagonal(backbone, expert, examples)
        backbone.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        backbone.model.enable_input_require_grads()
        backbone.model.train()  # transformers checkpoints in training mode only
        for module in backbone.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        same(fisher_diagonal(backbone, expert, examples), expected, 1e-10)


def test_kept_sums_are_added_to_where_they_are() -> None:
    """Those from a file are on the CPU, those just summed where the backbone is; here that is no real place."""
    here, there = (FisherEstimate({"a": t}, {"a": t}, 1, 0.5) for t in (torch.ones(2), torch.ones(2, device="meta")))
    assert (there + here).even["a"].device.type == (there + here).odd["a"].device.type == "meta"
