"""Pretraining on scenes: what a run reads, that it is the same when it is repeated or broken off, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import pituning as pt
from pituning.backbones.ofa import OFAProcessor
from pituning.errors import RecipeError, RefusedError
from pituning.experiments import pretraining
from pituning.experiments.pretrain_recipe import PretrainRecipe
from pituning.experiments.pretraining import INFILLING, Collator, Stream, build, pretrain
from pituning.experiments.recipe import load_recipe
from pituning.tasks import pretraining_task
from pituning.training.evaluation import evaluate

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "pretrain": "tiny", "title": "a tiny one", "side": 48, "steps": 6, "learning_rate": 1e-3, "save_every": 2,
    "log_every": 1, "workers": 0, "infilling_every": 3, "output": "unused",
    "vocabulary": {"pieces": 300, "bins": 12, "texts": 20},
    "model": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "max_source_positions": 64, "max_target_positions": 64, "token_bucket_size": 16, "image_bucket_size": 8,
        "code_image_size": 16, "resnet_layers": [1, 1, 1], "resnet_stem_width": 4, "resnet_widths": [2, 2, 2], "dropout": 0.0,
    },
    "tasks": {"grounding": 2, "caption": 1, "vqa": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> PretrainRecipe:
    return PretrainRecipe(**SETTINGS)


@pytest.fixture(scope="module")
def processor(recipe: PretrainRecipe) -> OFAProcessor:
    return build(recipe)[1]


@pytest.fixture(scope="module")
def whole(recipe: PretrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pretrain(recipe, folder)
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "examples/s")} for line in lines]


class TestStream:
    def test_steps_hold_so_many_of_each_kind_and_every_third_is_infilling(self, recipe: PretrainRecipe) -> None:
        stream = Stream(recipe)
        kinds = [[stream[4 * step + n][0] for n in range(4)] for step in range(6)]
        assert len(stream) == 24
        assert kinds[0] == kinds[1] == ["grounding", "grounding", "caption", "vqa"]
        assert kinds[2] == kinds[5] == [INFILLING] * 4

    def test_later_steps_may_hold_other_numbers_and_questions_in_the_decoder(self, recipe: PretrainRecipe) -> None:
        later = {"after": 3, "tasks": {"grounding": 1, "vqa": 3}}
        stream = Stream(PretrainRecipe(**SETTINGS, later=later, decoder_prompts_after=4))
        kinds = [[stream[4 * step + n][0] for n in range(4)] for step in (1, 3, 4)]
        assert kinds == [["grounding", "grounding", "caption", "vqa"], *2 * [["grounding", "vqa", "vqa", "vqa"]]]
        assert [stream[4 * step + 3][1].decoder_prompt for step in (1, 3, 4)] == ["none", "none", "source_without_end"]
        assert Stream(recipe)[4 * 1 + 3][1].decoder_prompt == "source_without_end"

    def test_no_example_is_read_twice_and_none_of_what_is_held_out(self, recipe: PretrainRecipe) -> None:
        stream = Stream(recipe)
        ids = [stream[n][1].id for n in range(len(stream))]
        assert len(set(ids)) == len(ids)
        plain = pretraining_task("grounding", vocabulary="small", side=48).splits["train"]
        assert [stream[n][1].prompt for n in (0, 1, 4, 5)] == [plain[n].prompt for n in range(4)]
        assert {e.id.split("/")[0] for _, e in (stream[n] for n in range(4))} <= {f"pretrain-{k}" for k in recipe.tasks}

    def test_a_gap_hides_words_of_the_text_that_is_to_be_completed(self, recipe: PretrainRecipe) -> None:
        stream = Stream(recipe)
        for number in range(8, 12):
            example = stream[number][1]
            before, after = example.texts[0].split("<mask>")
            assert example.image is None
            assert example.target.startswith(before)
            assert example.target.endswith(after)
            missing = len(example.target.split()) - len(before.split()) - len(after.split())
            assert 1 <= missing <= 3


class TestCollator:
    def test_is_what_the_processor_makes_of_the_same_examples(
        self, recipe: PretrainRecipe, processor: OFAProcessor
    ) -> None:
        examples = [Stream(recipe)[n] for n in range(4)]
        found = Collator(processor)(examples)
        assert found.pop("kinds") == ["grounding", "grounding", "caption", "vqa"]
        targets = [processor.encode_box(e.box, (48, 48)) if e.box else f" {e.target.strip()}" for _, e in examples]
        images = [e.image for _, e in examples]
        expected = processor([e.prompt for _, e in examples], images, targets)
        assert found.keys() == expected.keys()
        for key in ("input_ids", "attention_mask", "patch_images", "patch_masks"):
            assert torch.equal(found[key], expected[key]), key
        for row, (_, example) in enumerate(examples):  # questions are read by the decoder, too
            one = processor([example.prompt], None, [targets[row]], decoder_prompt=example.decoder_prompt)
            length = one["labels"].shape[1]
            for key, padding in (("decoder_input_ids", processor.pad_id), ("labels", -100)):
                assert torch.equal(found[key][row, :length], one[key][0])
                assert (found[key][row, length:] == padding).all()
        assert [e.decoder_prompt for _, e in examples] == ["none", "none", "none", "source_without_end"]

    def test_the_gap_is_the_mask_symbol(self, recipe: PretrainRecipe, processor: OFAProcessor) -> None:
        batch = Collator(processor)([Stream(recipe)[n] for n in range(8, 12)])
        assert "patch_images" not in batch
        assert ((batch["input_ids"] == processor.tokenizer.mask_id).sum(1) == 1).all()
        text = Stream(recipe)[8][1].prompt
        assert processor.decode(batch["input_ids"][0].tolist()).split() == text.split()


class TestRun:
    def test_logs_a_line_for_each_step_with_the_losses_of_its_kinds(self, whole: Path) -> None:
        found = losses(whole)
        assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
        assert [set(line) - {"step"} for line in found[:3]] == [
            {"grounding", "caption", "vqa"},
            {"grounding", "caption", "vqa"},
            {INFILLING},
        ]

    def test_a_second_run_has_equal_losses(self, recipe: PretrainRecipe, whole: Path, tmp_path: Path) -> None:
        pretrain(recipe, tmp_path)
        assert losses(tmp_path) == losses(whole)

    def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(
        self, recipe: PretrainRecipe, whole: Path, tmp_path: Path
    ) -> None:
        assert pretrain(recipe, tmp_path, steps=3)["steps"] == 3
        with pytest.raises(RefusedError, match="holds checkpoint-3: go on from it with resume"):
            pretrain(recipe, tmp_path)
        assert pretrain(recipe, tmp_path, resume=True)["steps"] == 6
        assert losses(tmp_path) == losses(whole)
        files = [folder / "model" / "model.safetensors" for folder in (whole, tmp_path)]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_goes_on_neither_backwards_nor_with_other_settings(self, recipe: PretrainRecipe, tmp_path: Path) -> None:
        pretrain(recipe, tmp_path, steps=3)
        for steps in (2, 3):
            with pytest.raises(RefusedError, match=f"is to stop after {steps} steps: give more than 3"):
                pretrain(recipe, tmp_path, resume=True, steps=steps)
        changed = {
            **SETTINGS,
            "learning_rate": 2e-3,
            "later": {"after": 2, "tasks": {"vqa": 4}},
            "workers": 0,
            "title": "x",
        }
        with pytest.raises(
            RefusedError, match=r"learning_rate 0\.001, the recipe says 0\.002; later None, the"
        ) as caught:
            pretrain(PretrainRecipe(**changed), tmp_path, resume=True)
        assert "title" not in str(caught.value)
        assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3]

    def test_what_begins_later_may_still_be_changed(self) -> None:
        recipe, later = PretrainRecipe(**SETTINGS), {"after": 4, "tasks": {"vqa": 4}}
        changed = PretrainRecipe(**SETTINGS | {"steps": 9, "decay_steps": 5}, later=later, decoder_prompts_after=4)
        assert PretrainRecipe(**SETTINGS, later=later).shaped(4) == recipe.shaped(4)
        differing = [{k for k, v in changed.shaped(n).items() if v != recipe.shaped(n)[k]} for n in (0, 4, 5)]
        assert differing == [set(), {"decoder_prompts_after"}, {"decoder_prompts_after", "later", "steps, decay_steps"}]

    def test_rates_are_of_the_steps_since_the_last_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([10.0, 12.0, 12.0, 13.0, 13.0])
        monkeypatch.setattr(pretraining, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        log, control = pretraining._Log(tmp_path / "log.jsonl", stop_after=5, seen=6), SimpleNamespace()
        control.should_training_stop = False
        log.on_train_begin(SimpleNamespace(), SimpleNamespace(global_step=0), control)
        for step in range(1, 6):
            log.on_step_end(SimpleNamespace(logging_steps=4), SimpleNamespace(global_step=step), control)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [(line["step"], line["examples/s"]) for line in lines] == [(4, 12.0), (5, 6.0)]

    def test_writes_a_backbone_in_half_precision_that_knows_the_tasks(self, whole: Path) -> None:
        backbone = pt.load_backbone(str(whole / "model"))
        assert next(backbone.model.parameters()).dtype == torch.float32
        found = evaluate(backbone, None, pretraining_task("grounding", split="pretrain-val", side=48, size=6))
        assert 0 <= found.metrics["acc@0.5"] <= 1
        record = json.loads((whole / "model" / "pretraining.json").read_text())
        assert (record["steps"], record["examples"], record["recipe"]["side"]) == (6, 24, 48)

    def test_statistics_of_the_norms_have_moved_and_are_as_trained(self, whole: Path) -> None:
        backbone = pt.load_backbone(str(whole / "model"))
        buffers = dict(backbone.model.named_buffers())
        trained = [b for n, b in buffers.items() if n.endswith("running_mean")]
        assert trained
        assert all(b.abs().sum() > 0 for b in trained)

    def test_a_run_may_be_made_longer_while_the_rate_stays(self, tmp_path: Path) -> None:
        changed = {"warmup_steps": 2, "decay_steps": 2}
        whole, part = tmp_path / "whole", tmp_path / "part"
        pretrain(PretrainRecipe(**{**SETTINGS, **changed, "steps": 8}), whole)
        pretrain(PretrainRecipe(**{**SETTINGS, **changed, "steps": 6}), part, steps=4)
        pretrain(PretrainRecipe(**{**SETTINGS, **changed, "steps": 8}), part, resume=True)
        assert losses(part) == losses(whole)
        files = [folder / "model" / "model.safetensors" for folder in (whole, part)]
        assert files[0].read_bytes() == files[1].read_bytes()


class TestRecipe:
    @pytest.mark.parametrize(
        ("tasks", "problem"),
        [({"grounding": 2}, "2 examples in a step, but there are 4"), ({"detection": 4}, "no 'detection' in tasks")],
    )
    def test_later_steps_must_be_as_large_and_of_known_kinds(self, tasks: dict[str, int], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            PretrainRecipe(**SETTINGS, later={"after": 2, "tasks": tasks})

    def test_every_mistake_is_named_at_once(self, tmp_path: Path) -> None:
        wrong = {**SETTINGS, "tasks": {"dancing": 3}, "steps": 0, "model": {"d_modell": 3}, "wings": 2}
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(RecipeError, match=r"4 problem\(s\)") as caught:
            load_recipe(path)
        for part in ("no kind of pretraining 'dancing'", "no setting d_modell", "steps", "wings"):
            assert part in str(caught.value)

    def test_the_recipe_that_ships_is_valid_and_of_the_promised_size(self) -> None:
        recipe = load_recipe(ROOT / "recipes" / "ofa-nano.yaml")
        assert isinstance(recipe, PretrainRecipe)
        small = recipe.model_copy(update={"vocabulary": recipe.vocabulary.model_copy(update={"texts": 50})})
        parameters = sum(p.numel() for p in build(small)[0].parameters())
        assert 3e6 <= parameters <= 8e6
