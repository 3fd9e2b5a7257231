"""The shapes that the recipe blink uses."""

from .base import Case
from .layers import cross_entropy, norm_act, pool_norm_act
from .updates import AIR_FILTERS, muon, narrowed, sgd_nesterov
from .whitening import whiten

_VECTORS = [(64,), (64,), (256,), (256,), (256,), (256,), (24,)]
_HEAD = [(10, 256)]


def blink_cases(batch: int = 2000) -> list[Case]:
    """Every call of the recipe blink in its training steps, on images of 24x24 and of 32x32.

    Optimizers do not depend on the batch; below 16, where the interpreter only checks results, they get fewer channels.
    """
    filters = narrowed(AIR_FILTERS, 8 if batch < 16 else 1)
    return [
        *(whiten(batch, side, side, 24, gather=("shift", "flip")) for side in (24, 32)),
        *(
            pool_norm_act(batch, channels, side, side, squeeze=False)
            for channels, side in ((64, 23), (64, 31), (256, 11), (256, 15), (256, 5), (256, 7))
        ),
        *(
            norm_act(batch, channels, side, side)
            for channels, side in ((64, 11), (64, 15), (256, 5), (256, 7), (256, 2), (256, 3))
        ),
        cross_entropy(batch, 10, scale=1 / 256),
        sgd_nesterov(_VECTORS, rates=True),
        sgd_nesterov(_HEAD, rates=True),
        muon(filters, rates=True),
    ]
