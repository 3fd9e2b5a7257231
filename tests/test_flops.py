"""FLOPs of a run against a count by hand."""

from dataclasses import replace

import pytest

from blink.training.budget import plan_budget
from blink.training.flops import run_flops
from blink.training.recipes import AIR, HLB, Resolution, freezing


def by_hand(recipe, stem, convolutions, head, views, budget, frozen_from=None):
    """stem: (positions, multiply-adds each, whether it has a trained projection); convolutions: (side, in, out)."""
    first = 2 * convolutions[0][0] ** 2 * convolutions[0][1] * convolutions[0][2] * 9
    convs = sum(2 * side**2 * i * o * 9 for side, i, o in convolutions)
    positions, whiten, project = stem
    forward = 2 * positions * (whiten + project) + convs + 2 * head
    # each convolution and the head give two gradients; the projection one, for its input needs none
    step = forward + 2 * convs + 2 * 2 * head + 2 * positions * project
    images = budget.batch_size * budget.total_steps
    training = images * step
    if frozen_from is not None:
        # without a trained stem nobody needs the first convolution's input gradient
        training -= budget.batch_size * (budget.total_steps - frozen_from) * first
    return training, 10_000 * views * forward


def test_hlb():
    budget = plan_budget(HLB, 50_000)
    convolutions = [(31, 32, 128), (15, 128, 128), (15, 128, 128), (15, 128, 256), (7, 256, 512), (3, 512, 512)]
    convolutions.append(convolutions[-1])
    training, evaluation = by_hand(HLB, (31**2, 12 * 12, 12 * 32), convolutions, 512 * 10, 2, budget)
    # gates: two products forward, four backward
    gates = 2 * 2 * (128 * 8 + 512 * 32)
    training += 3 * gates * budget.batch_size * budget.total_steps
    evaluation += 2 * 10_000 * gates
    flops = run_flops(HLB, budget, (3, 32, 32), 10, 50_000, 10_000)
    assert (flops.training, flops.evaluation, flops.optimizer) == (training, evaluation, 0)
    assert flops.whitening == 2 * 50_000 * 31**2 * 12**2
    assert flops.total == pytest.approx(0.81e15, rel=0.01)


def test_smaller_images_frozen_layers_and_fewer_views():
    """Counted phase by phase: 200 steps, the first 50 on 24x24, the last 50 with the first group frozen."""
    recipe = freezing(replace(AIR, resolutions=(Resolution(0.25, 0.75),), tta_fraction=0.3), 0, 6)
    recipe = replace(
        recipe, groups=tuple(replace(g, epochs=2) if g.params == "stem.bias" else g for g in recipe.groups)
    )
    budget = plan_budget(recipe, 50_000)

    def forward(sides):
        a, b, c = (s**2 for s in sides[1:])
        widths = [(sides[0] ** 2, 24, 64), (a, 64, 64), (a, 64, 256), (b, 256, 256), (b, 256, 256), (c, 256, 256)]
        return 2 * sides[0] ** 2 * 12 * 24, [2 * 9 * n * i * o for n, i, o in widths], 2 * 2560

    def step(sides, frozen):
        stem, convs, head = forward(sides)
        if frozen == "nothing":
            return stem + 3 * sum(convs) + 3 * head
        if frozen == "stem":
            return stem + 3 * sum(convs) - convs[0] + 3 * head
        # the second group's first convolution still has a weight gradient, but its input needs none
        return stem + sum(convs[:2]) + 2 * convs[2] + 3 * sum(convs[3:]) + 3 * head

    whole, small = (31, 15, 7, 3), (23, 11, 5, 2)
    training = 2000 * (50 * step(small, "nothing") + 100 * step(whole, "stem") + 50 * step(whole, "group"))
    stem, convs, head = forward(whole)
    flops = run_flops(recipe, budget, (3, 32, 32), 10, 50_000, 10_000)
    assert flops.training == training
    assert flops.evaluation == (10_000 + 5 * 3_000) * (stem + sum(convs) + head)


def test_air():
    budget = plan_budget(AIR, 50_000)
    convolutions = [(31, 24, 64), (15, 64, 64), (15, 64, 256), (7, 256, 256), (7, 256, 256), (3, 256, 256)]
    stem = (31**2, 12 * 24, 0)
    training, evaluation = by_hand(AIR, stem, convolutions, 256 * 10, 6, budget, frozen_from=75)
    flops = run_flops(AIR, budget, (3, 32, 32), 10, 50_000, 10_000)
    assert (flops.training, flops.evaluation) == (training, evaluation)
    assert flops.whitening == 2 * 5_000 * 31**2 * 12**2
    # Newton-Schulz, three steps of 4 m^2 k + 2 m^3
    shapes = [(64, 216), (64, 576), (256, 576), *[(256, 2304)] * 3]
    assert flops.optimizer == 200 * 3 * sum(4 * m * m * k + 2 * m**3 for m, k in shapes)
    assert flops.total == pytest.approx(0.292e15, rel=0.01)
