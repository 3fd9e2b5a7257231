"""What the ops require of their options, fused and reference alike. Needs no triton."""

import math
from collections.abc import Sequence
from numbers import Real

SHAPE_FACTORS = ("original", "match_rms_adamw", "spectral_unclamped", None)

# the kernels compute in float32, in which a smaller one may be 0
_TINY, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def number(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, found {value!r}")
    return value


def positive(op: str, name: str, value: float) -> None:
    if not _TINY <= number(op, name, value) <= _LARGEST:
        raise ValueError(f"{op}: {name} must be positive and finite in float32, found {value}")


def not_negative(op: str, name: str, value: float) -> None:
    if not 0 <= number(op, name, value) <= _LARGEST:
        raise ValueError(f"{op}: {name} must be 0 or more and finite in float32, found {value}")


def fraction(op: str, name: str, value: float) -> None:
    if not 0 <= number(op, name, value) <= 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1, found {value}")


def batch_norm(op: str, momentum: float, eps: float) -> None:
    """PyTorch's momentum, but for None, which makes a cumulative average."""
    if momentum is None:
        raise TypeError(f"{op}: momentum must be a number from 0 to 1, found None; there is no cumulative average")
    fraction(op, "momentum", momentum)
    positive(op, "eps", eps)


def update(op: str, momentum: float, weight_decay: float) -> None:
    not_negative(op, "momentum", momentum)
    not_negative(op, "weight_decay", weight_decay)


def pixel_statistics(op: str, raw: bool, mean: object, std: object) -> None:
    """raw: whether the images are uint8, which need both; what is normalized already takes neither."""
    if raw != (mean is not None) or (mean is None) != (std is None):
        kind = "uint8" if raw else "normalized"
        raise ValueError(f"{op}: mean and std are for uint8 images, which need both; found {kind} images")


def shape_factor(op: str, name: str | None) -> None:
    if name not in SHAPE_FACTORS:
        raise ValueError(f"{op}: shape_factor must be one of {', '.join(map(str, SHAPE_FACTORS))}, found {name!r}")


def iteration(op: str, steps: int, coefficients: Sequence[float], eps: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{op}: steps must be an integer of at least 1, found {steps!r}")
    three = isinstance(coefficients, Sequence) and len(coefficients) == 3
    if not (three and all(isinstance(value, Real) and math.isfinite(value) for value in coefficients)):
        raise ValueError(f"{op}: coefficients must be three finite numbers, found {coefficients!r}")
    positive(op, "eps", eps)
