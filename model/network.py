"""The network: whitening stem, convolution groups, with squeeze-and-excite or without, global max-pool, linear head.

Sources of the architectures and their numbers: hlb-CIFAR10 v0.3.0 (the defaults of `NetworkConfig`), airbench94_muon
(`AIR` in recipes, from which the default recipe comes).
"""

import torch
from torch import Tensor, nn

from blink.kernels.gather import Gather
from blink.model.backend import Backend
from blink.model.config import Group, NetworkConfig
from blink.model.convolution import Conv3x3
from blink.model.layers import ConvGroup, NormAct, PlainStem, ProjectedStem, SEGate, WhitenStem


class Network(nn.Module):
    """images [B, C, H, W] uint8 -> logits [B, classes] float32.

    Raises ValueError for images smaller than `config.minimum_image_size`, or fewer than 2 classes.
    """

    def __init__(self, config: NetworkConfig, classes: int, image_shape: tuple[int, int, int], backend: Backend):
        super().__init__()
        in_channels, height, width = image_shape
        if min(height, width) < config.minimum_image_size:
            raise ValueError(
                f"images of {height}x{width} are too small: this network's {len(config.conv_groups)} poolings need "
                f"at least {config.minimum_image_size}x{config.minimum_image_size}"
            )
        if classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, found {classes}")

        def make_norm(channels: int, kind: type[NormAct] = NormAct) -> NormAct:
            return kind(channels, config.norm_momentum, config.norm_eps, config.activation, backend)

        def make_gate(group: Group) -> SEGate | None:
            if config.se_reduction is None or not group.se or group.depth == 0:
                return None
            return SEGate(group.channels, config.se_reduction, config.activation, backend)

        self.config = config
        size, padding = config.whiten_kernel, config.whiten_padding
        if size is None:
            channels = config.stem_channels or 2 * in_channels * 2**2
            self.stem = PlainStem(in_channels, channels, make_norm(channels), backend.conv3x3)
        elif config.stem_channels is None:
            self.stem = WhitenStem(in_channels, size, padding, config.activation, backend)
        else:
            norm = make_norm(config.stem_channels)
            self.stem = ProjectedStem(in_channels, config.stem_channels, size, padding, norm, backend)
        widths = [self.stem.out_channels, *(group.channels for group in config.conv_groups)]
        self.groups = nn.ModuleList(
            ConvGroup(before, group.channels, group.depth, group.residual, make_gate(group), make_norm, backend.conv3x3)
            for before, group in zip(widths, config.conv_groups)
        )
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """What differs from PyTorch's own random weights, which the constructors drew."""
        for module in self.modules():
            if self.config.dirac and isinstance(module, Conv3x3):
                nn.init.dirac_(module.weight[: module.in_channels])
            if self.config.gates_start_constant and isinstance(module, SEGate):
                nn.init.zeros_(module.fc2.weight)
        if self.config.head_std is not None:
            self.head.weight.mul_(self.config.head_std / self.head.weight.std())

    @torch.no_grad()
    def copy_only(self, varying: Tensor) -> None:
        """Take back the identity filters of channels that do not vary, in the convolution behind the stem.

        varying: [C] bool, which of the stem's channels do, from `initialize_stem`. An identity would carry a constant
        through every layer, and each BatchNorm would multiply its gradient by 1 / sqrt(eps), there being no variance.
        Such a filter starts random, as those beyond the identities do. Where no channel varies, all filters of the
        network start at zero and stay there, as none of them then has a gradient.
        """
        weights = [module.weight for module in self.modules() if isinstance(module, Conv3x3)]
        if self.config.dirac:
            first = weights[0][: len(varying)]
            # PyTorch's own, drawn on the CPU: the same on every device
            random = nn.init.kaiming_uniform_(torch.empty(first.shape), a=5**0.5)
            first.copy_(torch.where(varying[: len(first), None, None, None], first, random.to(first)))
        something = varying.any()
        for weight in weights:
            weight.mul_(something)

    def forward(self, images: Tensor, gather: Gather | None = None) -> Tensor:
        """With `gather`, images is the data set [N, C, H, W] and the batch is what gather takes of it."""
        return self.raw_logits(images, gather).float() * self.config.logit_scale

    def raw_logits(self, images: Tensor, gather: Gather | None = None) -> Tensor:
        """The head's output in the compute dtype, before `config.logit_scale`: what the fused loss scales itself."""
        device = images.device.type
        autocast = torch.is_autocast_enabled(device)
        x = self.stem(images, gather, torch.get_autocast_dtype(device) if autocast else self.head.weight.dtype)
        for group in self.groups:
            x = group(x)
        # one of ties wins, as in airbench94; hlb-CIFAR10's amax shares the gradient among them, but under torch.compile
        # divides it by zero, as a maximum kept rounded is not found again among values recomputed unrounded
        return self.head(x.permute(0, 2, 3, 1).flatten(1, 2).max(1).values)

    def widest_activation(self, size: tuple[int, int]) -> int:
        """How many values the largest result of a layer holds for one image of this height and width."""
        lost = self.config.whiten_kernel - 1 if self.config.fused_stem else 0
        height, width = (side - lost for side in size)
        values = [self.stem.out_channels * height * width]
        for group in self.groups:
            values.append(group.conv1.out_channels * height * width)
            height, width = height // 2, width // 2
        return max(values)

    def to_compute_dtype(self, dtype: torch.dtype) -> "Network":
        """Convolution and linear weights in `dtype`; BatchNorm, whitening and pixel statistics stay float32."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not getattr(self.stem, "whiten", None):
                module.to(dtype)
        return self.to(memory_format=torch.channels_last)
