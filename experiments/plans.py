"""Plans: named sets of recipes that `blink ablate` compares; the first of a plan is its baseline."""

from dataclasses import dataclass, replace

from blink.training.recipes import (
    AIR,
    BLINK,
    HLB,
    ParamGroup,
    Recipe,
    Resolution,
    freezing,
    gated,
    with_group,
    with_network,
)


@dataclass(frozen=True)
class Plan:
    """summary: what is asked; variants: name -> recipe.

    stems: (old, new): each variant's stem is measured by itself, and what hlb-CIFAR10's author said of the change from
    one to the other is set beside what was measured.
    ladder: (variant, rungs): how many epochs the rungs, one recipe at several budgets, need for the variant's accuracy.
    """

    summary: str
    variants: dict[str, Recipe]
    stems: tuple[str, str] | None = None
    ladder: tuple[str, tuple[str, ...]] | None = None


def narrowed(recipe: Recipe, width: float) -> Recipe:
    """The recipe with `width` times the channels, rounded to multiples of 8, and at least 8."""

    def scaled(channels: int) -> int:
        return max(8, 8 * round(channels * width / 8))

    network = recipe.network
    groups = tuple(replace(group, channels=scaled(group.channels)) for group in network.conv_groups)
    stem = network.stem_channels and scaled(network.stem_channels)
    return with_network(recipe, conv_groups=groups, stem_channels=stem)


def stretched(recipe: Recipe, factor: float) -> Recipe:
    """The recipe for `factor` times its epochs, groups that are trained for a part of them included."""
    groups = tuple(replace(g, epochs=g.epochs and factor * g.epochs) for g in recipe.param_groups)
    return replace(recipe, epochs=factor * recipe.epochs, param_groups=groups)


_WHITENING = Plan(
    "what the padded 3x3 whitening convolution gave up for the unpadded 2x2 one (recipe hlb)",
    {
        "3x3 same": with_network(HLB, whiten_kernel=3, whiten_padding="same"),
        "3x3 unpadded": with_network(HLB, whiten_kernel=3),
        "2x2 same": with_network(HLB, whiten_padding="same"),
        "2x2 unpadded": HLB,
        "none": with_network(HLB, whiten_kernel=None),
    },
    stems=("3x3 same", "2x2 unpadded"),
)

_NO_SE = with_network(HLB, se_reduction=None)


def _alone(group: int) -> Recipe:
    groups = tuple(replace(g, se=i == group) for i, g in enumerate(HLB.network.conv_groups))
    return with_network(HLB, conv_groups=groups)


_SE = Plan(
    "what squeeze-and-excite gives and costs (recipe hlb)",
    {
        "off": _NO_SE,
        **{f"reduction {r}": with_network(HLB, se_reduction=r) for r in (4, 8, 16, 32)},
        "first group alone": _alone(0),
        "last group alone": _alone(2),
        "off, 1.25 x epochs": stretched(_NO_SE, 1.25),
        "off, 1.5 x epochs": stretched(_NO_SE, 1.5),
    },
    ladder=("reduction 16", ("off", "off, 1.25 x epochs", "off, 1.5 x epochs")),
)


# airbench94's rate and decay, which trained the same network before Muon
_SGD = dict(rule="sgd", lr=0.0015, momentum=0.85, decay=2e-6)

_BLINK = Plan(
    "each part of the recipe blink taken away in turn",
    {
        "blink": BLINK,
        "whole images": replace(BLINK, resolutions=()),
        "whole images, 7.3 epochs": replace(BLINK, resolutions=(), epochs=7.3),
        "8 epochs": replace(BLINK, epochs=8),
        "all images augmented": replace(BLINK, tta_fraction=1.0),
        "no augmented test": replace(BLINK, tta="mirror", tta_fraction=0.0),
        "random flip": replace(BLINK, flip="random"),
        "no translation": replace(BLINK, translation=0),
        "no label smoothing": replace(BLINK, label_smoothing=0.0),
        "no Dirac start": with_network(BLINK, dirac=False),
        "SGD in Muon's place": with_group(BLINK, "filters", **_SGD),
        "no whitening": with_network(BLINK, whiten_kernel=None),
    },
)

_RECIPES = Plan("the recipes against each other", {"air": AIR, "blink": BLINK})

_SMALL_BATCH = replace(AIR, batch_size=1000)
_LOW = (Resolution(0.4, 0.75),)
_FAST = freezing(replace(_SMALL_BATCH, resolutions=_LOW), 0, 6)
_TUNED = with_group(replace(_SMALL_BATCH, tta_fraction=0.25), "filters", lr=0.17)
_KEEP = freezing(replace(_TUNED, keep=0.8), 0, 5)
_EARLY = (Resolution(0.25, 0.75),)
_LONG = freezing(replace(_TUNED, epochs=9, resolutions=_EARLY), 0, 5.5)
_FIRST = freezing(replace(_TUNED, epochs=8.5, keep=0.8, translation=3, resolutions=_EARLY), 0, 5.25)


_COARSE = replace(AIR, resolutions=_LOW)


def _deeper(recipe: Recipe) -> Recipe:
    """With one more convolution in the last group, where pixels are fewest, and a residual around the two."""
    *groups, last = recipe.network.conv_groups
    return with_network(recipe, conv_groups=(*groups, replace(last, depth=2, residual=True)))


def _gates(rule: str, lr: float) -> ParamGroup:
    return ParamGroup("gates", rule, lr, 0.6 if rule == "muon" else 0.85)


_SEARCH = Plan(
    "the way from air to blink, with A: batch 1000, 24 px for 0.4 of the steps, the first group frozen after 6 epochs; "
    "B: batch 1000, Muon lr 0.17, keep 0.8, frozen after 5, augmented tests where least sure",
    {
        "air": AIR,
        "7 epochs": replace(AIR, epochs=7),
        "24 px for 0.4": _COARSE,
        "24 px, deeper": _deeper(_COARSE),
        "24 px, translation 3": replace(_COARSE, translation=3),
        "24 px, jitter": replace(_COARSE, jitter=(0.14, 0.13)),
        "24 px, SiLU": with_network(_COARSE, activation="silu"),
        "24 px, SE /16 last": gated(_COARSE, 16, (2,), _gates("sgd", 0.05)),
        "batch 1000": _SMALL_BATCH,
        "A: + 24 px, freeze 6": _FAST,
        "A, lr 0.18": with_group(_FAST, "filters", lr=0.18),
        "A, keep 0.8": replace(_FAST, keep=0.8),
        "B: keep 0.8, freeze 5": _KEEP,
        "B, keep 1, 24 px": freezing(replace(_TUNED, resolutions=_LOW), 0, 5),
        "B, 24 px for 0.25": replace(_KEEP, resolutions=_EARLY),
        "B, long": _FIRST,
        "B, long, keep 1": _LONG,
        "air, 24 px, freeze 6": freezing(replace(AIR, resolutions=_EARLY), 0, 6),
        "B, keep 0.7": replace(_KEEP, keep=0.7),
        "B, SiLU": with_network(_KEEP, activation="silu"),
        "B, smoothing 0.1": replace(_KEEP, label_smoothing=0.1),
        "B, translation 3": replace(_KEEP, translation=3),
        "B, cutout 8": replace(_KEEP, cutout=8),
        "B, jitter": replace(_KEEP, jitter=(0.14, 0.13)),
        "B, residuals": with_network(
            _KEEP, conv_groups=tuple(replace(group, residual=True) for group in AIR.network.conv_groups)
        ),
        "B, SE /16 last": gated(_KEEP, 16, (2,), _gates("sgd", 0.05)),
        "B, SE /16 last two": gated(_KEEP, 16, (1, 2), _gates("sgd", 0.05)),
        "B, SE /4 last two": gated(_KEEP, 4, (1, 2), _gates("sgd", 0.05)),
        "B, SE /16 Muon": gated(_KEEP, 16, (1, 2), _gates("muon", 0.05)),
    },
)


def _last(recipe: Recipe, channels: int) -> Recipe:
    """With so many channels in the last group."""
    *groups, last = recipe.network.conv_groups
    return with_network(recipe, conv_groups=(*groups, replace(last, channels=channels)))


_GATED = gated(BLINK, 16, (1, 2), _gates("sgd", 0.05))

# all gates start alike, which the BatchNorm behind them undoes: as if they started at 1
_LEVERAGE = Plan(
    "squeeze-and-excite as leverage in blink: what it gives by itself, and spent on fewer channels or epochs",
    {
        "blink": BLINK,
        "SE /16 last": gated(BLINK, 16, (2,), _gates("sgd", 0.05)),
        "SE /16 last two": _GATED,
        "SE /16 all": gated(BLINK, 16, (0, 1, 2), _gates("sgd", 0.05)),
        "SE /8 last two": gated(BLINK, 8, (1, 2), _gates("sgd", 0.05)),
        "SE /4 last two": gated(BLINK, 4, (1, 2), _gates("sgd", 0.05)),
        "SE /16 last two, Muon": gated(BLINK, 16, (1, 2), _gates("muon", 0.05)),
        "192 channels last": _last(BLINK, 192),
        "192, SE /16 last two": _last(_GATED, 192),
        "8 epochs": replace(BLINK, epochs=8),
        "8 epochs, SE /16": replace(_GATED, epochs=8),
    },
)

PLANS = {
    "recipes": _RECIPES,
    "whitening": _WHITENING,
    "se": _SE,
    "blink": _BLINK,
    "search": _SEARCH,
    "leverage": _LEVERAGE,
}
