"""`--set NAME=VALUE` and `--flip`: any setting of a recipe, checked."""

from dataclasses import asdict, fields

import pytest

from blink.errors import UserError
from blink.training.overrides import with_settings
from blink.training.recipes import AIR, BLINK, HLB, RECIPES, Recipe, Resolution, with_flip
from blink.training.show_recipes import settings


@pytest.mark.parametrize(
    "recipe, setting, found",
    [
        (HLB, "epochs=3", lambda r: r.epochs == 3.0 and type(r.epochs) is float),
        (HLB, "batch_size=64", lambda r: r.batch_size == 64),
        (HLB, "network.se_reduction=8", lambda r: r.network.se_reduction == 8),
        (HLB, "network.se_reduction=None", lambda r: r.network.se_reduction is None),
        (HLB, "network.whiten_padding=same", lambda r: r.network.whiten_padding == "same"),
        (HLB, "network.conv_groups.1.channels=96", lambda r: r.network.conv_groups[1].channels == 96),
        (HLB, "network.conv_groups.1.residual=False", lambda r: r.network.conv_groups[1].residual is False),
        (AIR, "param_groups.2.lr=0.5", lambda r: r.param_groups[2].lr == 0.5),
        (AIR, "param_groups.0.layers=(0, 1)", lambda r: r.param_groups[0].layers == (0, 1)),
        (AIR, "jitter=(0.1, 0)", lambda r: r.jitter == (0.1, 0.0)),
        (AIR, "flip=none", lambda r: r.flip == "none"),
        (AIR, "tta=None", lambda r: r.tta is None),
        (BLINK, "resolutions.0.scale=0.5", lambda r: r.resolutions == (Resolution(0.4, 0.5),)),
        (BLINK, "resolutions=()", lambda r: r.resolutions == ()),
        (BLINK, "schedule.peak=1e-1", lambda r: r.schedule.peak == 0.1),
    ],
)
def test_a_setting_is_set_and_no_other(recipe, setting, found):
    changed = with_settings(recipe, [setting])
    assert found(changed)
    before, after = settings(asdict(recipe)), settings(asdict(changed))
    name = setting.partition("=")[0]
    assert {key for key in before.keys() | after.keys() if before.get(key, 0) != after.get(key, 0)} <= {
        key for key in before.keys() | after.keys() if key == name or key.startswith(f"{name}.")
    }


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_setting_that_is_listed_can_be_set_to_what_it_is(recipe):
    listed = settings(asdict(recipe))
    again = [f"{name}={value!r}" for name, value in listed.items() if name not in ("name", "summary")]
    assert len(again) > len(fields(Recipe))
    assert with_settings(recipe, again) == recipe


def test_later_ones_win():
    assert with_settings(HLB, ["epochs=3", "epochs=4"]).epochs == 4


@pytest.mark.parametrize(
    "setting, message",
    [
        ("epochs", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("epoch=3", "there is no 'epoch' among name, summary, network"),
        ("epochs=many", "expected a number"),
        ("epochs=True", "expected a number"),
        ("batch_size=1.5", "expected a whole number"),
        ("network.se_reduction=off", "expected a whole number or None"),
        ("network.se_reduction=0", "the SE reduction is at least 1"),
        ("network.conv_groups.9.channels=3", "expected one of 0 to 2 in place of '9'"),
        ("network.conv_groups.x.channels=3", "expected one of 0 to 2 in place of 'x'"),
        ("network.conv_groups=(1, 2)", "expected () or a setting of one of them, as in NAME.0.FIELD"),
        ("network=3", "expected one of its own settings, as in NAME.FIELD"),
        ("epochs.0=3", "nothing is inside of"),
        ("flip=sideways", "expected random or alternating or none"),
        ("jitter=(0.1,)", "expected (2 numbers) or None"),
        ("keep=0", "keep is a fraction above 0"),
        ("name=mine", "what a recipe is called stays"),
        ("epochs=__import__('os')", "expected a number"),
    ],
)
def test_impossible_settings_are_one_line(setting, message):
    with pytest.raises(UserError) as caught:
        with_settings(HLB, [setting])
    text = str(caught.value)
    assert message in text and text.startswith(f"--set {setting.partition('=')[0]}") and "\n" not in text


def test_without_mirroring_no_mirror_image_is_tested():
    assert (with_flip(HLB, "none").flip, with_flip(HLB, "none").tta) == ("none", None)
    assert (with_flip(AIR, "none").flip, with_flip(AIR, "none").tta) == ("none", "translate")
    assert (with_flip(HLB, "alternating").flip, with_flip(HLB, "alternating").tta) == ("alternating", HLB.tta)
