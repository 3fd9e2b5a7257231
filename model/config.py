"""What defines a network, and what it may run on, as plain data: recipes and arguments need no PyTorch for it."""

import math
from dataclasses import dataclass

# of `kernels.reference`, by name
ACTIVATIONS = (None, "relu", "silu", "gelu", "hardswish")
# of backends: what --kernels takes
CHOICES = ("auto", "fused", "native", "reference", "compiled")


@dataclass(frozen=True)
class Group:
    """One convolution group: its width, how many convolutions follow its first, its residual, its SE gate."""

    channels: int
    depth: int = 2
    residual: bool = True
    se: bool = True

    def __post_init__(self):
        if self.channels < 1 or self.depth < 0:
            raise ValueError(f"a group has 1 channel or more, and 0 further convolutions or more, unlike {self}")


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that defines a network besides image size and class count.

    whiten_kernel: 2 or 3; None: no whitening, but a trained 3x3 'same' convolution from the normalized pixels.
    stem_channels: what the whitened pixels are projected to; None: no projection, but whitening by every filter and its
    negative with a trained bias. dirac: each convolution starts as the identity of its input as far as it has filters
    (and, see `Network.copy_only`, as far as the images vary).
    head_std: the standard deviation that the head's random weights are scaled to; None: PyTorch's.
    gates_start_constant: the last weights of every squeeze-and-excite gate start at 0, so that all images get the same
    gate, which the BatchNorm after it undoes: the network starts as the one without gates.
    """

    whiten_kernel: int | None = 2
    whiten_padding: int | str = 0
    whiten_eps: float = 1e-2
    stem_channels: int | None = 32
    conv_groups: tuple[Group, ...] = (Group(128), Group(256, depth=0), Group(512))
    se_reduction: int | None = 16
    activation: str = "gelu"
    norm_momentum: float = 0.8
    norm_eps: float = 1e-12
    logit_scale: float = 0.1
    dirac: bool = False
    head_std: float | None = None
    gates_start_constant: bool = False

    def __post_init__(self):
        if not self.conv_groups:
            raise ValueError("a network has at least one group of convolutions, and none is given")
        if self.whiten_kernel not in (2, 3, None):
            raise ValueError(f"the whitening kernel is 2, 3 or None, not {self.whiten_kernel}")
        if self.whiten_padding not in (0, "same"):
            raise ValueError(f"the whitening padding is 0 or 'same', not {self.whiten_padding!r}")
        if self.se_reduction is not None and self.se_reduction < 1:
            raise ValueError(f"the SE reduction is at least 1 (or None for no SE), not {self.se_reduction}")
        if self.stem_channels is not None and self.stem_channels < 1:
            raise ValueError(f"stem_channels is at least 1 (or None for no projection), not {self.stem_channels}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(map(str, ACTIVATIONS))}, not {self.activation!r}")
        if not 0 <= self.norm_momentum <= 1:
            raise ValueError(f"norm_momentum is from 0 to 1, not {self.norm_momentum}")
        for name in ("whiten_eps", "norm_eps", "logit_scale", "head_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is a number above 0, not {value}")

    @property
    def minimum_image_size(self) -> int:
        """The smallest side that leaves at least one pixel after every group's pooling."""
        return 2 ** len(self.conv_groups) + (self.whiten_kernel - 1 if self.fused_stem else 0)

    @property
    def fused_stem(self) -> bool:
        """Whether the stem can run as one fused op (padded ones and those without whitening cannot)."""
        return self.whiten_kernel is not None and self.whiten_padding == 0
