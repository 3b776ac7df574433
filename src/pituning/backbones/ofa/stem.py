"""The image stem of OFA: a ResNet without its last stage, 16 pixels per patch in each direction.

Source: He et al., "Deep Residual Learning", CVPR 2016, in the variant with the stride on the 3×3 convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pituning.backbones.ofa.configuration import OFAConfig

EXPANSION = 4  # a bottleneck block's outer channels per inner channel


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a whole residual branch per example and scale up the ones that stay.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Args:
        rate: probability that an example's branch is dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, …]`` to the same."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device, dtype=torch.float32) >= self.rate
        return x / (1 - self.rate) * keep.to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rate={self.rate}"


def drop_path_rates(last: float, count: int) -> list[float]:
    """Rates that grow linearly from 0 in the first of ``count`` layers to ``last`` in the last one."""
    return [last * i / max(1, count - 1) for i in range(count)]


class StemBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics move only where its own scale is trained; a frozen backbone never drifts.

    Args:
        frozen: never move the statistics and never train scale and shift, whatever requires a gradient.
    """

    def __init__(self, width: int, frozen: bool) -> None:
        super().__init__(width)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` to the same."""
        if self.training and self.weight.requires_grad and not self.frozen:
            return super().forward(x)
        weight, bias = (self.weight.detach(), self.bias.detach()) if self.frozen else (self.weight, self.bias)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        # nothing is trained here, and the convolution's output is this norm's own: in place, a tenth of the stem's time
        scale = weight * torch.rsqrt(self.running_var + self.eps)
        shift = bias - self.running_mean * scale
        return x.mul_(scale[:, None, None]).add_(shift[:, None, None])


class StemBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, drop_path_rate: float, frozen: bool) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = StemBatchNorm(width, frozen)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = StemBatchNorm(width, frozen)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = StemBatchNorm(out, frozen)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False),
                StemBatchNorm(out, frozen),
            )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, h, w]`` to ``[batch, 4 · width, h / stride, w / stride]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.drop_path(self.bn3(self.conv3(x)))
        trained = torch.is_grad_enabled() and (x.requires_grad or shortcut.requires_grad)
        return F.relu(x + shortcut if trained else x.add_(shortcut), inplace=True)


class ImageStem(nn.Module):
    """The three-stage ResNet.

    Attributes:
        out_channels: channels of a patch's feature vector.
    """

    def __init__(self, config: OFAConfig) -> None:
        super().__init__()
        assert config.resnet_layers is not None
        assert config.resnet_widths is not None
        channels = config.resnet_stem_width
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = StemBatchNorm(channels, config.freeze_resnet)
        stages = []
        for index, (blocks, width) in enumerate(zip(config.resnet_layers, config.resnet_widths, strict=True)):
            rates = drop_path_rates(config.resnet_drop_path_rate, blocks)
            stage = []
            for block in range(blocks):
                stride = 2 if index and not block else 1
                rate = rates[block] if block else 0.0
                stage.append(StemBlock(channels, width, stride, rate, config.freeze_resnet))
                channels = width * EXPANSION
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.out_channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 3, height, width]`` to ``[batch, channels, height / 16, width / 16]``, rounded up."""
        images = images.contiguous(memory_format=torch.channels_last)  # faster convolutions, on CPU by a quarter
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out
