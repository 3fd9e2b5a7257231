"""One list of calls for every op: the shapes that the hlb network and the recipe blink really use, and any other.

The tests, the ahead-of-time compile report and the benchmarks all work from it, so a new op is registered once, here,
with its arguments and what its mathematics costs. Bytes are what an ideal fused op must move to and from memory: each
large tensor once for every pass that a dependency forces; vectors of a value per channel are left out.
"""

from .base import Case, Cost, Tensors, activations, images, mapped, named
from .blink import blink_cases
from .layers import (
    cross_entropy,
    excite_norm_act_add,
    norm_act,
    pool_norm_act,
    se_gate,
    squeeze_excite,
)
from .updates import AIR_FILTERS, HLB_SHAPES, muon, narrowed, newton_schulz, sgd_nesterov
from .whitening import GATHER_PARTS, whiten, whiten_project_norm_act

__all__ = [
    "AIR_FILTERS", "GATHER_PARTS", "HLB_SHAPES", "SWEEP", "Case", "Cost", "Tensors", "activations", "blink_cases",
    "case_at", "cross_entropy", "excite_norm_act_add", "images", "mapped", "muon", "named", "network_cases",
    "newton_schulz", "norm_act", "pool_norm_act", "se_gate", "sgd_nesterov", "small_cases", "squeeze_excite", "whiten",
    "whiten_project_norm_act",
]  # fmt: skip


def network_cases(batch: int = 512) -> list[Case]:
    """Every call of the hlb network in a training step on 32x32 images; also what airbench's has beside it, the first
    ones of a step on smaller images, cross_entropy at ImageNet's class count, the whitening ops with a gather (hlb's,
    and all that one can do), and gates as wide as hlb's with reduction 4, EfficientNet's and the widest of RegNet's.

    Optimizers do not depend on the batch; below 16, where the interpreter only checks results, they get fewer channels.
    """
    divisor = 8 if batch < 16 else 1
    return [
        whiten(batch, 32, 32, 24),
        whiten(batch, 32, 32, 12),
        whiten_project_norm_act(batch, 32, 32, 32),
        whiten_project_norm_act(batch, 32, 32, 32, kernel=3),
        whiten(batch, 32, 32, 24, gather=("shift", "flip")),
        whiten(batch, 32, 32, 24, gather=GATHER_PARTS),
        whiten_project_norm_act(batch, 32, 32, 32, gather=("shift", "flip")),
        whiten_project_norm_act(batch, 32, 32, 32, gather=GATHER_PARTS),
        whiten_project_norm_act(batch, 32, 32, 32, kernel=3, gather=GATHER_PARTS),
        whiten(batch, 24, 24, 24, gather=("shift", "flip")),
        pool_norm_act(batch, 128, 31, 31, fork=True),
        pool_norm_act(batch, 64, 23, 23, squeeze=False),
        pool_norm_act(batch, 256, 15, 15, squeeze=False),
        pool_norm_act(batch, 512, 7, 7, fork=True),
        se_gate(batch, 128, 8),
        se_gate(batch, 512, 32),
        se_gate(batch, 512, 128),
        se_gate(batch, 2000, 500),
        excite_norm_act_add(batch, 128, 15, 15),
        excite_norm_act_add(batch, 512, 3, 3),
        norm_act(batch, 128, 15, 15),
        norm_act(batch, 256, 7, 7),
        norm_act(batch, 512, 3, 3),
        squeeze_excite(batch, 128, 15, 15, 8, activation="gelu"),
        squeeze_excite(batch, 512, 3, 3, 32, activation="gelu"),
        squeeze_excite(batch, 1152, 7, 7, 48, activation="silu"),
        squeeze_excite(batch, 2000, 7, 7, 500),
        cross_entropy(batch, 10),
        cross_entropy(2000, 10),
        cross_entropy(batch, 1000),
        sgd_nesterov(narrowed(HLB_SHAPES, divisor), rates=True),
        newton_schulz(narrowed(AIR_FILTERS, divisor)),
        muon(narrowed(AIR_FILTERS, divisor), rates=True),
    ]


def small_cases() -> list[Case]:
    """One cheap call of every op, but of values enough that the ratio of two root mean square errors is no luck."""
    return [
        whiten(2, 6, 7, 12),
        whiten_project_norm_act(3, 8, 7, 12),
        whiten(2, 6, 7, 12, gather=GATHER_PARTS),
        whiten_project_norm_act(2, 6, 7, 5, gather=GATHER_PARTS),
        pool_norm_act(2, 12, 5, 7),
        se_gate(3, 20, 5),
        norm_act(2, 12, 3, 5),
        excite_norm_act_add(2, 12, 3, 5),
        squeeze_excite(2, 12, 3, 5, 4),
        cross_entropy(5, 7),
        sgd_nesterov([(12, 3, 3, 3), (7, 5), (9,)]),
        newton_schulz([(12, 3, 3, 3), (7, 5)]),
        muon([(12, 3, 3, 3), (7, 5)]),
    ]


def case_at(op: str, batch: int, height: int, width: int, channels: int) -> Case:
    """The case of `op` for [batch, channels, height, width]; for the whitening ops, images of height x width; for
    cross_entropy, as many classes as channels.

    Optimizer ops take a 3x3 convolution of `channels` with its bias, whatever the batch and the images.
    """
    hidden = max(1, channels // 16)
    (filters,) = narrowed([(channels, channels, 3, 3)], 8 if batch < 16 else 1)
    return {
        "whiten": lambda: whiten(batch, height, width, channels),
        "whiten_project_norm_act": lambda: whiten_project_norm_act(batch, height, width, channels),
        "se_gate": lambda: se_gate(batch, channels, hidden),
        "norm_act": lambda: norm_act(batch, channels, height, width),
        "excite_norm_act_add": lambda: excite_norm_act_add(batch, channels, height, width),
        "pool_norm_act": lambda: pool_norm_act(batch, channels, height, width),
        "squeeze_excite": lambda: squeeze_excite(batch, channels, height, width, hidden),
        "cross_entropy": lambda: cross_entropy(batch, channels),
        "sgd_nesterov": lambda: sgd_nesterov([filters, filters[:1]]),
        "newton_schulz": lambda: newton_schulz([filters]),
        "muon": lambda: muon([filters]),
    }[op]()


# (batch, height, width, channels): the network's resolutions and widths at batches around its own
SWEEP = [(b, s, s, c) for b in (128, 512, 2048) for s, c in ((32, 32), (15, 128), (7, 256), (3, 512))]
