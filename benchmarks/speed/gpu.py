"""What a GPU is for: bfloat16, torch.compile, OFA-large at 480 pixels, and how near it comes to the processor's ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.generation import collapsed
from benchmarks.speed.interpolation import build, step_seconds, trainable
from benchmarks.speed.measuring import Sample, Setting, interleaved, peak_mb, seconds
from benchmarks.speed.models import SMALL_OFA, random_experts
from benchmarks.speed.ofa import FixedBatch
from benchmarks.speed.steps import EXPERTS, PART, shapes
from pituning.backbones.ofa.configuration import OFAConfig
from pituning.backbones.ofa.generation import BeamSettings, beam_search
from pituning.backbones.ofa.modeling import OFAForConditionalGeneration
from pituning.interpolation import build_mixture
from pituning.methods import attached, config_dict, make_config
from pituning.training.module import running
from pituning.training.precision import precision

TERA = 1e12
LARGE_BATCH = 16
MODES = {"one expert": None, "π": "experts"}


def matmul(setting: Setting) -> dict[str, Sample]:
    """Floating-point operations per second of square float32 matrix products."""
    return {"float32": ceiling(setting, torch.float32)}


def bf16(setting: Setting) -> dict[str, Sample]:
    """Whole steps in float32 and under bfloat16 autocast."""
    built = build("lora", EXPERTS, **_larger(setting), device=setting.device)

    def step(train: str | None, name: str) -> float:
        with precision(built.backbone, name), trainable(built, train) as (loss, parameters):
            return step_seconds(loss, parameters, setting.device)[PART]

    cases = {f"{mode}, {p}": partial(step, train, p) for mode, train in MODES.items() for p in ("fp32", "bf16")}
    times = interleaved(cases, setting.pick(30, 1))
    samples = {f"{mode}, bf16, seconds": Sample.of(times[f"{mode}, bf16"]) for mode in MODES}
    samples |= {
        f"{mode}, float32 / bf16": Sample.ratio(times[f"{mode}, fp32"], times[f"{mode}, bf16"]) for mode in MODES
    }
    return samples


def compiled(setting: Setting, backend: str = "inductor") -> dict[str, Sample]:
    """Whole steps of one expert, bfloat16: the model as it is, and compiled."""
    built = {n: build("lora", 1, **_larger(setting), device=setting.device) for n in ("eager", "compiled")}
    steps: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        for name, one in built.items():
            stack.enter_context(precision(one.backbone, "bf16"))
            loss, parameters = stack.enter_context(trainable(one, None))
            if name == "compiled":
                one.backbone.model.compile(backend=backend)
            steps[name] = partial(_step, loss, parameters, setting.device)
        first = seconds(steps["compiled"], setting.device)
        times = interleaved(steps, setting.pick(30, 1), warm_up=3)
    return {
        "eager, seconds": Sample.of(times["eager"]),
        "compiled, seconds": Sample.of(times["compiled"]),
        "eager / compiled": Sample.ratio(times["eager"], times["compiled"]),
        "first two steps, with compiling": Sample.once(first),
    }


def ofa_large(setting: Setting) -> dict[str, Sample]:
    """OFA-large at 480 pixels in bfloat16: steps, memory, operations per second against the ceiling, and beam search."""
    torch.manual_seed(0)
    config = setting.pick(OFAConfig.of_size("large"), OFAConfig(**SMALL_OFA))
    batch, side, words = setting.pick((LARGE_BATCH, 480, 50000), (2, 32, 500))
    backbone = FixedBatch(OFAForConditionalGeneration(config), batch, side, setting.device, words)
    settings = config_dict(make_config("bottleneck", backbone, r=setting.pick(128, 4)))
    pool = random_experts(backbone, settings, EXPERTS)
    limit = ceiling(setting, torch.bfloat16)
    samples = {"ceiling": limit}
    mixture, carried = build_mixture(pool, train="experts")
    search = BeamSettings(beam=5, min_len=4, max_len_b=4)
    with precision(backbone, "bf16"):
        with attached(backbone, settings, pool[0].tensors):
            samples |= _steps("one expert", lambda: backbone.loss({}), batch, limit, setting)
        with running(backbone, mixture, carried) as model:
            samples |= _steps("π", model, batch, limit, setting)
        folded = collapsed(pool)
        with attached(backbone, folded.config, folded.tensors):
            write = partial(beam_search, backbone.model, backbone.inputs, search)
            times = interleaved({"write": partial(seconds, write, setting.device)}, setting.pick(20, 1))["write"]
    samples["beam search, collapsed"] = Sample.rate(batch, times)
    return samples


def ceiling(setting: Setting, dtype: torch.dtype) -> Sample:
    """Tera-operations per second of square matrix products, a multiplication and an addition being two."""
    size = setting.pick(8192 if setting.device != "cpu" else 2048, 64)
    left, right = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
    times = interleaved({"product": partial(seconds, lambda: left @ right, setting.device)}, setting.pick(30, 2), 3)
    return Sample.rate(2 * size**3 / TERA, times["product"])


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, forward and backward, in one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _steps(name: str, losses: Callable[[], Tensor], batch: int, limit: Sample, setting: Setting) -> dict[str, Sample]:
    """Forward and backward; gradients are added up, which changes neither time nor memory of the next step."""

    def step() -> None:
        losses().sum().backward()  # type: ignore[no-untyped-call]

    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    count = operations(step)
    times = interleaved({name: partial(seconds, step, setting.device)}, setting.pick(20, 1), warm_up=2)[name]
    achieved = Sample.rate(count / TERA, times)
    top = limit.value
    share = Sample(achieved.value / top, achieved.low / top, achieved.high / top, achieved.repeats)
    return {
        f"{name}, pictures": Sample.rate(batch, times),
        f"{name}, achieved": achieved,
        f"{name}, achieved / ceiling": share,
        f"{name}, peak": Sample.once(peak_mb(setting.device)),
    }


def _larger(setting: Setting) -> dict[str, int]:
    """BERT-base's shape, 64 × 128 tokens: MiniLM's would measure how fast Python starts kernels."""
    return setting.pick({"batch": 64, "tokens": 128, "hidden": 768, "layers": 12}, shapes(setting))


def _step(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], device: str) -> float:
    return step_seconds(loss, parameters, device)[PART]
