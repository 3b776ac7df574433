"""One training loop for experts and interpolations: plain AdamW, resumable, and blind to everything frozen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pituning.backbones.base import Backbone
from pituning.errors import DataError, ExpertError, PituningError, RefusedError
from pituning.example import Example
from pituning.experts import Expert
from pituning.interpolation import Mixture, build_mixture
from pituning.methods import attached, initial_tensors, make_config
from pituning.training.module import running
from pituning.training.trainer import MixtureTrainer, TrainSettings, _arguments, fit, settings_dict

PREFIX = "base_model.model."
PLAIN = TrainSettings(learning_rate=1e-2, steps=3, batch_size=16, schedule="constant", warmup=0.0, max_grad_norm=0.0)
BATCHES = TrainSettings(learning_rate=1e-2, alpha_learning_rate=5e-2, steps=10, batch_size=4)


class KilledError(Exception):
    """Stands in for a process that dies."""


@contextmanager
def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training dies in the middle of step ``steps + 1``."""
    compute, count = MixtureTrainer.compute_loss, [0]

    def dies(self: MixtureTrainer, *arguments: Any, **options: Any) -> Tensor:
        if count[0] == steps:
            raise KilledError
        count[0] += 1
        return compute(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KilledError):  # noqa: PT012
        patch.setattr(MixtureTrainer, "compute_loss", dies)
        yield


def make(backbone: Backbone, experts: list[Expert], train: str) -> tuple[Mixture, dict[str, Any]]:
    initial = None
    if train == "shared" and experts[0].config["peft_type"] == "LORA":
        modules = sorted({k.removeprefix(PREFIX).split(".lora_")[0] for e in experts for k in e.tensors})
        initial = initial_tensors(backbone, make_config("lora", backbone, r=2, target_modules=modules))
    return build_mixture(experts, train=train, initial=initial)


def state(mixture: Mixture) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in mixture.named_parameters()}


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_one_expert_is_plain_fine_tuning(
    backbone_of: Any, random_expert: Any, random_examples: Any, distance: Any, family: str, method: str
) -> None:
    """Three full-batch steps of AdamW on the parameters that PEFT itself attached, in float64."""
    backbone = backbone_of(family, torch.float64)
    expert, examples = random_expert(backbone, method, 1), random_examples(6, 1)
    with attached(backbone, expert.config, expert.tensors) as site:
        optimizer = torch.optim.AdamW(site.parameters.values(), lr=1e-2, weight_decay=0.1)
        batch = backbone.collate(examples)
        for _ in range(3):
            optimizer.zero_grad()
            backbone.loss(batch).mean().backward()
            optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    mixture, config = build_mixture([expert], train="experts")
    result = fit(backbone, mixture, config, examples, PLAIN.with_(weight_decay=0.1))
    assert result.steps == 3
    for key, tensor in mixture().items():
        assert distance(tensor, expected[key]) < 1e-7, key
        assert distance(tensor, expert.tensors[key]) > 1e-4, f"{key} must have moved"


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_gradients_are_clipped_by_their_norm(
    backbone_of: Any, random_expert: Any, random_examples: Any, clip: float
) -> None:
    backbone = backbone_of("encoder", torch.float64)
    expert, examples = random_expert(backbone, "lora", 2), random_examples(6, 2)
    settings = PLAIN.with_(steps=2, max_grad_norm=clip)
    seen = []
    with attached(backbone, expert.config, expert.tensors) as site:
        parameters = list(site.parameters.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            backbone.loss(backbone.collate(examples)).mean().backward()
            norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
            seen.append(float(norm))
            for parameter in parameters:
                parameter.grad *= min(1.0, clip / (float(norm) + 1e-6))
            optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    assert all(norm > 0.05 for norm in seen), "the small clip must bite"
    mixture, config = build_mixture([expert], train="experts")
    fit(backbone, mixture, config, examples, settings)
    for key, tensor in mixture().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize(
    ("train", "free"),
    [
        ("experts", ("alpha", "experts", "a.", "b.")),
        ("shared", ("alpha", "delta")),
        ("weights", ("alpha",)),
        ("none", ()),
    ],
)
def test_only_what_the_mode_trains_moves(
    bert: Backbone, random_experts: Any, random_examples: Any, method: str, train: str, free: tuple[str, ...]
) -> None:
    mixture, config = make(bert, random_experts(bert, method, 3, 3), train)
    before, backbone = state(mixture), {k: v.clone() for k, v in bert.model.state_dict().items()}
    result = fit(bert, mixture, config, random_examples(8, 3), BATCHES.with_(steps=3))
    after = state(mixture)
    for name, tensor in before.items():
        moved = not torch.equal(after[name], tensor)
        assert moved == name.startswith(free), name
    assert result.steps == (3 if free else 0)
    assert backbone.keys() == bert.model.state_dict().keys()
    assert all(torch.equal(v, backbone[k]) for k, v in bert.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in bert.model.parameters())


def test_alpha_has_its_own_learning_rate_and_no_decay(
    bert: Backbone, random_experts: Any, random_examples: Any
) -> None:
    moved = {}
    for rate, alpha in ((0.0, 0.0), (1e-2, 0.0), (0.0, 1e-2)):
        mixture, config = build_mixture(random_experts(bert, "bottleneck", 2, 4), [0.3, 0.7], train="experts")
        before = state(mixture)
        settings = BATCHES.with_(learning_rate=rate, alpha_learning_rate=alpha, steps=2, weight_decay=0.5)
        fit(bert, mixture, config, random_examples(8, 4), settings)
        moved[rate, alpha] = {n.split(".")[0] for n, p in state(mixture).items() if not torch.equal(p, before[n])}
    assert moved == {(0.0, 0.0): set(), (1e-2, 0.0): {"experts"}, (0.0, 1e-2): {"alpha"}}


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_the_only_weight_of_a_single_expert_is_not_trained(
    bert: Backbone, random_expert: Any, random_examples: Any, method: str
) -> None:
    """``train="weights"`` with K = 1: softmax of one number is 1 whatever the number, so nothing can be learned."""
    expert = random_expert(bert, method, 5)
    mixture, config = build_mixture([expert], train="weights")
    fit(bert, mixture, config, random_examples(8, 5), BATCHES.with_(steps=2))
    assert all(torch.equal(mixture()[k], t) for k, t in expert.tensors.items())


class TestResume:
    def runs(
        self, backbone: Backbone, experts: list[Expert], train: str, examples: Any, settings: TrainSettings, folder: Path,
        monkeypatch: pytest.MonkeyPatch, after: int = 5, held_out: Any = (),
    ) -> tuple[Mixture, Mixture]:  # fmt: skip
        """The same run uninterrupted, and killed after some steps and resumed; what they report is the same, too."""
        whole, config = make(backbone, experts, train)
        expected = fit(backbone, whole, config, examples, settings, folder=folder / "whole", held_out=held_out)
        dead, config = make(backbone, experts, train)
        with killed_after(after, monkeypatch):
            fit(backbone, dead, config, examples, settings, folder=folder / "part", held_out=held_out)
        resumed, config = make(backbone, experts, train)
        count: list[int] = []
        compute = MixtureTrainer.compute_loss

        def counted(self: MixtureTrainer, *arguments: Any, **options: Any) -> Tensor:
            count.append(1)
            return compute(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(MixtureTrainer, "compute_loss", counted)
            result = fit(
                backbone, resumed, config, examples, settings, folder=folder / "part", resume=True, held_out=held_out
            )
        assert result.steps == settings.steps
        for name in (
            "held_out",
            "weights",
            "best_step",
            "end_step",
        ):  # the first training loss after a resume is `Trainer`'s own
            assert getattr(result, name) == getattr(expected, name), name
        assert len(count) < (settings.steps or 0), "the run must go on from its checkpoint"
        return whole, resumed

    @pytest.mark.parametrize("method", ["lora", "bottleneck"])
    @pytest.mark.parametrize("train", ["experts", "shared", "weights"])
    def test_ends_where_an_uninterrupted_run_ends(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, method: str, train: str,
    ) -> None:  # fmt: skip
        experts, examples = random_experts(bert, method, 2, 6), random_examples(10, 6)
        whole, resumed = self.runs(bert, experts, train, examples, BATCHES, tmp_path, monkeypatch)
        start = state(make(bert, experts, train)[0])
        assert any(not torch.equal(p, start[n]) for n, p in state(whole).items())
        for name, parameter in state(whole).items():
            torch.testing.assert_close(state(resumed)[name], parameter, rtol=0, atol=0, msg=name)

    def test_remembers_the_best_state_before_the_kill(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A rate that only does harm: the best state is an early one, and the resumed run must end with it, too."""
        experts, examples = random_experts(bert, "bottleneck", 2, 7), random_examples(10, 7)
        settings = BATCHES.with_(learning_rate=3.0, keep_best=True, eval_every=2, schedule="constant", warmup=0.0)
        held_out = random_examples(9, 107, prefix="held")
        whole, resumed = self.runs(bert, experts, "experts", examples, settings, tmp_path, monkeypatch, 7, held_out)
        for name, parameter in state(whole).items():
            torch.testing.assert_close(state(resumed)[name], parameter, rtol=0, atol=0, msg=name)

    def test_without_a_checkpoint_starts_from_the_beginning(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        experts, examples = random_experts(bert, "bottleneck", 2, 8), random_examples(8, 8)
        first, config = make(bert, experts, "experts")
        fit(bert, first, config, examples, BATCHES.with_(steps=2))
        second, config = make(bert, experts, "experts")
        fit(bert, second, config, examples, BATCHES.with_(steps=2), folder=tmp_path / "new", resume=True)
        assert all(torch.equal(p, state(second)[n]) for n, p in state(first).items())

    def test_a_checkpoint_of_another_mixture_is_refused(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        examples = random_examples(8, 9)
        mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 9), "experts")
        fit(bert, mixture, config, examples, BATCHES.with_(steps=5), folder=tmp_path)
        other, config = make(bert, random_experts(bert, "bottleneck", 3, 9), "experts")
        with pytest.raises(RefusedError, match=r"checkpoint-5 of another run(?s:.*)tensors of the start"):
            fit(bert, other, config, examples, BATCHES.with_(steps=6), folder=tmp_path, resume=True)

    def test_a_damaged_checkpoint_is_refused(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        experts, examples = random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9)
        mixture, config = make(bert, experts, "experts")
        fit(bert, mixture, config, examples, BATCHES.with_(steps=2), folder=tmp_path)
        path = tmp_path / "checkpoint-2" / "mixture.safetensors"
        saved = safetensors.torch.load_file(path)
        saved["mixture.alpha"] = saved["mixture.alpha"][:, :1] * math.nan
        safetensors.torch.save_file({k: t.contiguous() for k, t in saved.items()}, path)
        again, config = make(bert, experts, "experts")
        with pytest.raises(ExpertError, match=r"tensor mixture\.alpha has shape \[\d+, 1\], expected \[\d+, 2\]"):
            fit(bert, again, config, examples, BATCHES.with_(steps=3), folder=tmp_path, resume=True)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("rate", "settings: learning_rate was 0.01, and is 0.02"),
            ("seed", "settings: seed was 0, and is 1"),
            ("start", "tensors of the start"),
            ("text", "training examples: hash was"),
            ("held-out", "held-out examples: count was 0, and is 3"),
            ("backbone", "backbone: fingerprint was"),
            ("length", "backbone: max_length was 128, and is 8"),
            ("configuration", 'adapter configuration: activation was "relu", and is "gelu"'),
        ],
    )
    def test_a_checkpoint_of_another_run_is_refused(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        message: Any, change: str, said: str,
    ) -> None:  # fmt: skip
        experts, examples, settings = random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9), BATCHES
        mixture, config = make(bert, experts, "experts")
        fit(bert, mixture, config, examples, settings.with_(steps=2), folder=tmp_path)
        held_out: list[Example] = []
        if change == "rate":
            settings = settings.with_(learning_rate=2e-2)
        elif change == "seed":
            settings = settings.with_(seed=1)
        elif change == "start":
            experts = random_experts(bert, "bottleneck", 2, 10)
        elif change == "text":
            examples = [replace(examples[0], texts=("gu",)), *examples[1:]]
        elif change == "held-out":
            held_out = random_examples(3, 10)
        elif change == "backbone":
            monkeypatch.setattr(bert, "fingerprint", "another")
        elif change == "length":
            monkeypatch.setattr(bert, "max_length", 8)
        other, config = make(bert, experts, "experts")
        if change == "configuration":
            config["activation"] = "gelu"
        before = state(other)
        found = message(fit, bert, other, config, examples, settings, folder=tmp_path, resume=True, held_out=held_out)
        assert f"{tmp_path} holds checkpoint-2 of another run" in found
        assert said in found
        assert len(found.splitlines()) == 2 + (change in ("held-out",)), "nothing else differs"
        assert all(torch.equal(p, before[n]) for n, p in state(other).items())

    def test_a_used_folder_is_refused_unless_the_run_goes_on(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        experts, examples = random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9)
        mixture, config = make(bert, experts, "experts")
        fit(bert, mixture, config, examples, BATCHES.with_(steps=2), folder=tmp_path)
        with pytest.raises(RefusedError, match="holds checkpoint-2: go on from it with resume"):
            fit(bert, mixture, config, examples, BATCHES.with_(steps=2), folder=tmp_path)
        (tmp_path / "run.json").unlink()
        with pytest.raises(RefusedError, match=r"holds checkpoint-2, but no run\.json"):
            fit(bert, mixture, config, examples, BATCHES.with_(steps=2), folder=tmp_path, resume=True)
        with pytest.raises(PituningError, match="resume=True needs the folder"):
            fit(bert, mixture, config, examples, BATCHES.with_(steps=2), resume=True)

    @pytest.fixture
    def parts(
        self, bert: Backbone, random_experts: Any, random_examples: Any
    ) -> tuple[list[Expert], list[Example], list[Example]]:
        """Experts, examples to train on, and examples that are held out."""
        return random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9), random_examples(4, 8)

    def test_a_finished_run_takes_no_more_steps_and_can_be_made_longer(
        self, bert: Backbone, parts: tuple[list[Expert], list[Example], list[Example]], tmp_path: Path
    ) -> None:
        """By a constant rate a run of three steps is the beginning of one of five."""
        experts, examples, held_out = parts
        settings, ends = BATCHES.with_(schedule="constant", warmup=0.0, eval_every=1, keep_best=True), []
        for steps, folder, resume in ((3, "a", False), (3, "a", True), (5, "a", True), (5, "b", False)):
            mixture, config = make(bert, experts, "experts")
            found = fit(
                bert, mixture, config, examples, settings.with_(steps=steps),
                held_out=held_out, folder=tmp_path / folder, resume=resume,
            )  # fmt: skip
            assert found.steps == steps
            ends.append((state(mixture), found.held_out, found.end_step))
        for (first, *figures), (second, *others) in (ends[:2], ends[2:]):
            assert figures == others
            assert all(torch.equal(p, second[n]) for n, p in first.items())
        mixture, config = make(bert, experts, "experts")
        with pytest.raises(RefusedError, match="is to have 4 steps: resume it with at least 5"):
            fit(
                bert, mixture, config, examples, settings.with_(steps=4),
                held_out=held_out, folder=tmp_path / "a", resume=True,
            )  # fmt: skip

    def test_a_run_may_end_at_its_checkpoint(
        self, bert: Backbone, parts: tuple[list[Expert], list[Example], list[Example]], tmp_path: Path
    ) -> None:
        """Whose step is none at which it was measured."""
        experts, examples, held_out = parts
        settings = BATCHES.with_(schedule="constant", warmup=0.0, eval_every=4, steps=5)
        mixture, config = make(bert, experts, "experts")
        fit(bert, mixture, config, examples, settings, held_out=held_out, folder=tmp_path)
        checkpoint = tmp_path / "checkpoint-5"
        record = json.loads((checkpoint / "history.json").read_text())
        loss = record["held_out"].pop("5", None)
        (checkpoint / "history.json").write_text(json.dumps(record))
        again, config = make(bert, experts, "experts")
        found = fit(bert, again, config, examples, settings, held_out=held_out, folder=tmp_path, resume=True)
        assert found.end_step == 5
        assert found.held_out[5] == pytest.approx(loss)

    def test_roundings_of_another_machine_make_no_other_run(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        experts, examples = random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9)
        for train in ("experts", "merge-then-tune"):
            for steps, weights in ((2, [0.4, 0.6]), (3, [0.4 + 1e-6, 0.6 - 1e-6])):
                mixture, config = build_mixture(experts, weights, train=train)
                fit(bert, mixture, config, examples, BATCHES.with_(steps=steps), folder=tmp_path / train, resume=True)
            other, config = build_mixture(experts, [0.41, 0.59], train=train)
            with pytest.raises(RefusedError, match="tensors of the start"):
                fit(bert, other, config, examples, BATCHES.with_(steps=4), folder=tmp_path / train, resume=True)

    def test_under_autocast_it_is_another_run(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        experts, examples = random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9)
        mixture, config = make(bert, experts, "experts")
        fit(bert, mixture, config, examples, BATCHES.with_(steps=2), folder=tmp_path)
        again, config = make(bert, experts, "experts")
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(RefusedError, match=r'backbone: autocast was null, and is "torch\.bfloat16"'),
        ):
            fit(bert, again, config, examples, BATCHES.with_(steps=3), folder=tmp_path, resume=True)

    def test_a_weight_of_zero_is_resumed(
        self, bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path
    ) -> None:
        """Its α is −∞."""
        experts, examples = random_experts(bert, "bottleneck", 2, 9), random_examples(8, 9)
        for steps in (2, 3):
            mixture, config = build_mixture(experts, [1.0, 0.0], train="experts")
            found = fit(bert, mixture, config, examples, BATCHES.with_(steps=steps), folder=tmp_path, resume=steps == 3)
            assert found.steps == steps
            assert mixture.weights().tolist() == [[1.0, 0.0]] * len(mixture.alpha)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize("train", ["experts", "shared", "weights"])
def test_checkpoints_hold_the_trained_tensors_and_nothing_else(
    bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path, method: str, train: str
) -> None:
    mixture, config = make(bert, random_experts(bert, method, 2, 10), train)
    fit(bert, mixture, config, random_examples(8, 10), BATCHES.with_(steps=5), folder=tmp_path)
    free = {n: p for n, p in mixture.named_parameters() if p.requires_grad}
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert 1 <= len(checkpoints) <= 2
    last = max(checkpoints, key=lambda p: int(p.name.split("-")[1]))
    saved = safetensors.torch.load_file(last / "mixture.safetensors")
    assert saved.keys() == {f"mixture.{n}" for n in free}
    assert all(torch.equal(saved[f"mixture.{n}"], p) for n, p in free.items())
    weights = [p.name for p in last.iterdir() if p.suffix in (".safetensors", ".bin") or "model" in p.name]
    assert sorted(weights) == ["mixture.safetensors"]
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    held = sum(v.numel() for s in optimizer["state"].values() for k, v in s.items() if k != "step")
    assert held == 2 * sum(p.numel() for p in free.values()), "two moments per trained number"
    state_file = json.loads((last / "trainer_state.json").read_text())
    assert state_file["global_step"] == 5


def test_nothing_is_written_without_a_folder(
    bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture, config = make(bert, random_experts(bert, "lora", 2, 11), "experts")
    fit(bert, mixture, config, random_examples(8, 11), BATCHES.with_(steps=3))
    assert os.listdir(tmp_path) == []


def test_the_seed_orders_the_examples(bert: Backbone, random_experts: Any, random_examples: Any) -> None:
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed() % 1000)
        mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 12), "experts")
        fit(bert, mixture, config, random_examples(10, 12), BATCHES.with_(steps=4, seed=seed))
        ends.append(state(mixture))
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items()), "the same seed, the same bits"
    assert any(not torch.equal(p, ends[2][n]) for n, p in ends[0].items()), "another seed, another order"


class TestHeldOut:
    def by_hand(self, backbone: Backbone, mixture: Mixture, config: dict[str, Any], examples: Any, loss: Any) -> float:
        """Mean −log p(right choice) of whatever the mixture is now."""
        return float(torch.cat([loss(backbone, mixture, config, [e]) for e in examples]).mean())

    def test_is_measured_before_along_and_after(
        self, bert: Backbone, random_experts: Any, random_examples: Any, mixture_loss: Any
    ) -> None:
        held_out = random_examples(7, 113, prefix="held")
        mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 13), "experts")
        first = self.by_hand(bert, mixture, config, held_out, mixture_loss)
        settings = BATCHES.with_(steps=6, eval_every=2)
        result = fit(bert, mixture, config, random_examples(8, 13), settings, held_out=held_out)
        assert list(result.held_out) == [0, 2, 4, 6]
        assert result.held_out[0] == pytest.approx(first, rel=1e-5)
        assert result.held_out[6] == pytest.approx(
            self.by_hand(bert, mixture, config, held_out, mixture_loss), rel=1e-5
        )
        assert result.held_out[result.best_step] == min(result.held_out.values())

    def test_measuring_changes_nothing(self, bert: Backbone, random_experts: Any, random_examples: Any) -> None:
        ends = []
        for held_out in ((), random_examples(5, 114, prefix="held")):
            mixture, config = make(bert, random_experts(bert, "lora", 2, 14), "experts")
            settings = BATCHES.with_(steps=4, eval_every=1)
            fit(bert, mixture, config, random_examples(10, 14), settings, held_out=held_out)
            ends.append(state(mixture))
        assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())

    def test_once_per_epoch_by_default(self, bert: Backbone, random_experts: Any, random_examples: Any) -> None:
        mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 15), "experts")
        settings = TrainSettings(epochs=3, batch_size=4)
        result = fit(bert, mixture, config, random_examples(10, 15), settings, held_out=random_examples(4, 115))
        assert result.steps == 3 * math.ceil(10 / 4)
        assert list(result.held_out) == [0, 3, 6, 9]

    def test_the_best_state_is_kept(self, bert: Backbone, random_experts: Any, random_examples: Any) -> None:
        held_out = random_examples(9, 116, prefix="held")
        harmful = BATCHES.with_(learning_rate=30.0, steps=4, eval_every=1, schedule="constant", warmup=0.0)
        for keep in (True, False):
            mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 16), "experts")
            before = state(mixture)
            result = fit(
                bert, mixture, config, random_examples(8, 16), harmful.with_(keep_best=keep), held_out=held_out
            )
            assert result.held_out[0] < min(v for k, v in result.held_out.items() if k), "the rate must do harm"
            assert all(torch.equal(p, before[n]) for n, p in state(mixture).items()) == keep


def test_training_learns(bert: Backbone, random_experts: Any, random_examples: Any) -> None:
    examples = random_examples(9, 17)
    mixture, config = make(bert, random_experts(bert, "lora", 2, 17), "shared")
    result = fit(bert, mixture, config, examples, BATCHES.with_(learning_rate=2e-2, steps=40), held_out=examples)
    assert result.held_out[result.steps] < 0.5 * result.held_out[0]


def test_no_examples_are_refused(bert: Backbone, random_experts: Any) -> None:
    mixture, config = make(bert, random_experts(bert, "lora", 2, 18), "experts")
    with pytest.raises(DataError, match="no examples to train on"):
        fit(bert, mixture, config, [], BATCHES)


@pytest.mark.parametrize("values", [{"steps": -1}, {"epochs": 0}, {"epochs": -1.5}, {"epochs": math.nan}])
def test_a_run_of_no_length_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PituningError, match=f"{next(iter(values))} must be"):
        TrainSettings(**values)
    with pytest.raises(PituningError, match=f"{next(iter(values))} must be"):
        BATCHES.with_(**values)


def test_a_run_that_diverges_says_so(bert: Backbone, random_experts: Any, random_examples: Any, tmp_path: Path) -> None:
    wild = BATCHES.with_(learning_rate=1e30, steps=6, schedule="constant", warmup=0.0)
    mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 20), "experts")
    first = next(iter(mixture()))
    with pytest.raises(PituningError, match=rf"diverged: after 6 steps (?s:.*) tensor {first} \[.*rate \(1e\+30\)"):
        fit(bert, mixture, config, random_examples(8, 20), wild, folder=tmp_path)
    logged = json.loads((tmp_path / "checkpoint-6" / "history.json").read_text())["training"]
    assert math.isnan(logged["6"]), "its losses are not shown as those of before"
    mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 20), "experts")
    assert fit(bert, mixture, config, random_examples(8, 20), wild, may_diverge=True).steps == 6


def test_a_run_that_diverges_after_its_best_state_keeps_that(
    bert: Backbone, random_experts: Any, random_examples: Any
) -> None:
    mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 20), "experts")
    before, wild = state(mixture), BATCHES.with_(learning_rate=1e30, steps=4, eval_every=1, keep_best=True, warmup=0.0)
    found = fit(bert, mixture, config, random_examples(8, 20), wild, held_out=random_examples(4, 21))
    assert math.isnan(found.held_out[4])
    assert found.end_step == 0
    assert all(torch.equal(p, before[n]) for n, p in state(mixture).items())


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_the_examples_of_a_smaller_batch_count_as_the_others(
    backbone_of: Any, random_expert: Any, random_examples: Any, distance: Any, penalty: float
) -> None:
    """Five examples in batches of four and one are one step of five."""
    backbone = backbone_of("encoder", torch.float64)
    examples = random_examples(5, 1)
    experts = [random_expert(backbone, "bottleneck", n) for n in (1, 2)]
    mixture, config = build_mixture(experts, [0.3, 0.7], train="experts")
    by_hand, _ = build_mixture(experts, [0.3, 0.7], train="experts")
    with running(backbone, by_hand, config) as model:
        total = sum(model(**backbone.collate([e]))[0] for e in examples)
        moved = by_hand.weights() - torch.tensor([[0.5, 0.5]], dtype=by_hand.alpha.dtype)
        (total / 5 + penalty * (moved**2).sum(1).mean()).backward()
    mixture.start.fill_(0.5)
    seen: dict[str, Tensor] = {}

    def step(optimizer: Any, *_: Any, **__: Any) -> None:
        seen.update({n: p.grad.clone() for n, p in mixture.named_parameters() if p.grad is not None})

    settings = PLAIN.with_(steps=1, batch_size=4, accumulate=2, weights_to_start=penalty)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        fit(backbone, mixture, config, examples, settings)
    assert seen.keys() == {n for n, p in by_hand.named_parameters() if p.grad is not None}
    for name, parameter in by_hand.named_parameters():
        if name in seen:
            assert distance(seen[name], parameter.grad) < 1e-5, name


def test_on_a_gpu_batches_are_there_already() -> None:
    """Only CPU tensors can be pinned."""
    gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert not _arguments(PLAIN, 8, None, "scratch", gpu, False).dataloader_pin_memory


def test_zero_steps_train_nothing(bert: Backbone, random_experts: Any, random_examples: Any) -> None:
    mixture, config = make(bert, random_experts(bert, "bottleneck", 2, 19), "experts")
    before = state(mixture)
    assert fit(bert, mixture, config, random_examples(4), BATCHES.with_(steps=0)).steps == 0
    assert all(torch.equal(p, before[n]) for n, p in state(mixture).items())


def test_settings_become_plain_values() -> None:
    values = settings_dict(BATCHES)
    assert json.loads(json.dumps(values)) == values
    assert TrainSettings(**values) == BATCHES


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_examples_count_by_their_weight_and_batches_add_up_to_a_step(
    backbone_of: Any, random_expert: Any, random_examples: Any, distance: Any, family: str
) -> None:
    """Three batches of two examples are one step of six, and an example of weight 2 counts twice."""
    backbone = backbone_of(family, torch.float64)
    expert = random_expert(backbone, "bottleneck", 1)
    weights = (0.3, 1.0, 2.0, 0.0, 1.0, 0.7)
    examples = [replace(e, weight=w) for e, w in zip(random_examples(6, 1), weights, strict=True)]
    with attached(backbone, expert.config, expert.tensors) as site:
        optimizer = torch.optim.AdamW(site.parameters.values(), lr=1e-2, weight_decay=0.0, eps=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            total = sum(e.weight * backbone.loss(backbone.collate([e]))[0] for e in examples)
            (total / len(examples)).backward()
            optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    original = torch.optim.AdamW
    settings = PLAIN.with_(steps=2, batch_size=2, accumulate=3)
    mixture, config = build_mixture([expert], train="experts")
    with pytest.MonkeyPatch.context() as patch:  # eps as above: Adam itself would hide a wrong scale of the gradient
        patch.setattr(torch.optim, "AdamW", lambda groups, **options: original(groups, **{**options, "eps": 1e-3}))
        result = fit(backbone, mixture, config, examples, settings)
    assert result.steps == 2
    for key, tensor in mixture().items():
        assert distance(tensor, expected[key]) < 1e-7, key
        assert distance(tensor, expert.tensors[key]) > 1e-4, f"{key} must have moved"


@pytest.mark.parametrize("family", ["encoder", "seq2seq"])
def test_label_smoothing_is_of_the_training_loss_only(
    backbone_of: Any, random_expert: Any, random_examples: Any, distance: Any, family: str
) -> None:
    backbone = backbone_of(family, torch.float64)
    expert, examples = random_expert(backbone, "bottleneck", 1), random_examples(5, 1)
    with attached(backbone, expert.config, expert.tensors) as site:
        optimizer = torch.optim.AdamW(site.parameters.values(), lr=1e-2, weight_decay=0.0)
        optimizer.zero_grad()
        backbone.loss(backbone.collate(examples), 0.3).mean().backward()
        optimizer.step()
        expected = {k: p.detach().clone() for k, p in site.parameters.items()}
    held = {}
    for smoothing in (0.3, 0.0):
        other, config = build_mixture([expert], train="experts")
        found = fit(
            backbone, other, config, examples, PLAIN.with_(steps=1, label_smoothing=smoothing), held_out=examples
        )
        held[smoothing] = found.held_out
        if smoothing:
            for key, tensor in other().items():
                assert distance(tensor, expected[key]) < 1e-7, key
    assert held[0.3][0] == held[0.0][0], "the held-out log-loss is not smoothed"
    assert held[0.3][1] != held[0.0][1]


def test_training_reads_its_examples_by_index_and_in_a_seeded_order(
    bert: Backbone, random_expert: Any, random_examples: Any
) -> None:
    class Lazily(Sequence[Example]):
        def __init__(self, examples: Sequence[Example]) -> None:
            self.examples, self.read = examples, list[int]()

        def __len__(self) -> int:
            return len(self.examples)

        def __getitem__(self, index: Any) -> Any:
            self.read.append(index)
            return self.examples[index]

    orders = []
    for seed in (0, 0, 1):
        lazy = Lazily(random_examples(12, 1))
        mixture, config = build_mixture([random_expert(bert, "lora", 1)], train="experts")
        fit(bert, mixture, config, lazy, BATCHES.with_(steps=2, batch_size=4, seed=seed))
        orders.append(lazy.read[:8])
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 8


def test_pictures_are_changed_in_training_only_and_only_if_wanted(
    t5: Backbone, random_expert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Example] = []

    class Watching:
        def __call__(self, example: Example) -> Example:
            seen.append(example)
            return example

    monkeypatch.setattr("pituning.training.trainer.augmenter", lambda name, seed: Watching() if name else None)
    examples = [Example(f"e{i}", ("ba",), "ba", "ba", augmentation="image-classification") for i in range(4)]
    for augment in (True, False):
        mixture, config = build_mixture([random_expert(t5, "lora", 1)], train="experts")
        fit(t5, mixture, config, examples, PLAIN.with_(steps=1, augment=augment), held_out=examples)
        assert len(seen) == 4, "once for every training example, never for a held-out one"
