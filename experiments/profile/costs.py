"""What each part of a training step must at least compute and move: FLOPs and bytes by (part, pass)."""

from math import prod

from torch import nn

from blink.kernels.examine import cases
from blink.kernels.examine.cases import Case, Cost
from blink.model.convolution import Conv3x3
from blink.model.network import Network
from blink.training.optimizer import Optimizer

Costs = dict[tuple[str, str], Cost]


def _convolution(batch: int, size: tuple[int, int], conv: Conv3x3, itemsize: int) -> dict[str, Cost]:
    """Each pass reads two of x, y and the weight and writes the third."""
    positions = batch * prod(size)
    tensors = positions * (conv.in_channels + conv.out_channels) + conv.weight.numel()
    cost = Cost(tensors * itemsize, 2 * positions * conv.weight.numel())
    return {"fwd": cost, "dgrad": cost, "wgrad": cost}


def step_costs(network: Network, optimizer: Optimizer, batch: int, image_shape: tuple[int, int, int]) -> Costs:
    """Of one step that trains everything. Part names are those that `instrument` gives the regions.

    Bytes of an op are those of an ideal fused one, counted in `kernels/examine/cases/`, whatever the backend.
    """
    config, itemsize = network.config, network.head.weight.element_size()
    channels, height, width = image_shape
    activation, k = config.activation, config.whiten_kernel
    out: Costs = {}

    def add(part: str, cost: dict[str, Cost]) -> None:
        out.update({(part, passed): value for passed, value in cost.items()})

    def of(case: Case) -> dict[str, Cost]:
        return case.cost(itemsize)

    if config.fused_stem:
        if config.stem_channels is None:
            case = cases.whiten(batch, height, width, network.stem.out_channels, k, channels, activation=activation)
        else:
            case = cases.whiten_project_norm_act(batch, height, width, config.stem_channels, k, channels)
        add("stem", of(case))
        height, width = height - k + 1, width - k + 1
    for number, (group, spec) in enumerate(zip(network.groups, config.groups)):
        name = f"groups.{number}"
        add(f"{name}.conv1", _convolution(batch, (height, width), group.conv1, itemsize))
        width_out = group.conv1.out_channels
        add(f"{name}.norm1", of(cases.pool_norm_act(batch, width_out, height, width, activation=activation)))
        height, width = height // 2, width // 2
        if group.se is not None:
            add(f"{name}.se", of(cases.se_gate(batch, width_out, group.se.fc1.out_features, activation)))
        for i in range(2, group.depth + 2):
            last = i == group.depth + 1
            add(f"{name}.conv{i}", _convolution(batch, (height, width), getattr(group, f"conv{i}"), itemsize))
            gate, residual = last and group.se is not None, last and spec.residual
            case = cases.excite_norm_act_add(
                batch, width_out, height, width, gate=gate, residual=residual, activation=activation
            )
            add(f"{name}.norm{i}", of(case))
    head: nn.Linear = network.head
    features, product = batch * head.in_features * height * width * itemsize, 2 * batch * head.weight.numel()
    add("head", {"fwd": Cost(features, product), "bwd": Cost(2 * features, 2 * product)})
    add("loss", of(cases.cross_entropy(batch, head.out_features)))
    updates = Cost(0)
    for group, params in zip(optimizer.groups, optimizer.params):
        shapes = [tuple(p.shape) for p in params]
        case = cases.muon(shapes) if group.rule == "muon" else cases.sgd_nesterov(shapes)
        cost = case.cost(itemsize)["fwd"]
        updates = Cost(updates.bytes + cost.bytes, updates.flops + cost.flops)
    add("optimizer", {"fwd": updates})
    return out
