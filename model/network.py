"""The network: whitening stem, three convolution groups with squeeze-and-excite, global max-pool, linear head.

Source of the architecture and its numbers: hlb-CIFAR10 v0.3.0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.gather import Gather
from model.backend import Backend
from model.layers import ConvGroup, NormAct, SEGate, WhitenStem


@dataclass(frozen=True)
class Group:
    """One convolution group: its width, whether it stops after its first convolution, whether it has an SE gate."""

    channels: int
    short: bool = False
    se: bool = True


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that defines a network besides image size and class count."""

    whiten_kernel: int = 2
    whiten_padding: int | str = 0
    whiten_eps: float = 1e-2
    stem_channels: int = 32
    groups: tuple[Group, ...] = (Group(128), Group(256, short=True), Group(512))
    se_reduction: int | None = 16
    activation: str = "gelu"
    norm_momentum: float = 0.8
    norm_eps: float = 1e-12
    logit_scale: float = 0.1

    def __post_init__(self):
        if self.whiten_kernel not in (2, 3):
            raise ValueError(f"the whitening kernel is 2 or 3, not {self.whiten_kernel}")
        if self.whiten_padding not in (0, "same"):
            raise ValueError(f"the whitening padding is 0 or 'same', not {self.whiten_padding!r}")
        if self.se_reduction is not None and self.se_reduction < 1:
            raise ValueError(f"the SE reduction is at least 1 (or None for no SE), not {self.se_reduction}")

    @property
    def minimum_image_size(self) -> int:
        """The smallest side that leaves at least one pixel after every group's pooling."""
        lost = self.whiten_kernel - 1 if self.whiten_padding == 0 else 0
        return 2 ** len(self.groups) + lost

    @property
    def fused_stem(self) -> bool:
        """Whether the whitening stem can run as one fused op (padded stems cannot)."""
        return self.whiten_padding == 0


class Network(nn.Module):
    """images [B, C, H, W] uint8 -> logits [B, classes] float32; with a `gather`, the batch is what it makes of them.

    Raises ValueError for images smaller than `config.minimum_image_size`, or fewer than 2 classes.
    """

    def __init__(self, config: NetworkConfig, classes: int, image_shape: tuple[int, int, int], backend: Backend):
        super().__init__()
        in_channels, height, width = image_shape
        if min(height, width) < config.minimum_image_size:
            raise ValueError(
                f"images of {height}x{width} are too small: this network's {len(config.groups)} poolings need "
                f"at least {config.minimum_image_size}x{config.minimum_image_size}"
            )
        if classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, found {classes}")

        def make_norm(channels: int, kind: type[NormAct] = NormAct) -> NormAct:
            return kind(channels, config.norm_momentum, config.norm_eps, config.activation, backend)

        def make_gate(group: Group) -> SEGate | None:
            if config.se_reduction is None or not group.se or group.short:
                return None
            return SEGate(group.channels, config.se_reduction, config.activation, backend)

        self.config = config
        self.stem = WhitenStem(
            in_channels,
            config.stem_channels,
            config.whiten_kernel,
            config.whiten_padding,
            make_norm(config.stem_channels),
            backend,
        )
        widths = [config.stem_channels, *(group.channels for group in config.groups)]
        self.groups = nn.ModuleList(
            ConvGroup(before, group.channels, group.short, make_gate(group), make_norm)
            for before, group in zip(widths, config.groups)
        )
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor, gather: Gather | None = None) -> Tensor:
        x = self.stem(images, gather)
        for group in self.groups:
            x = group(x)
        # amax shares the gradient among ties, as the recipe's authors trained it
        return self.head(x.amax((2, 3))).float() * self.config.logit_scale

    def to_compute_dtype(self, dtype: torch.dtype) -> "Network":
        """Convolution and linear weights in `dtype`; BatchNorm, whitening and pixel statistics stay float32."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.stem.whiten:
                module.to(dtype)
        return self.to(memory_format=torch.channels_last)
