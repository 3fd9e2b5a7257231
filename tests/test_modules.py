"""WhiteningConv2d, NormAct, PoolNormAct and convert: against the layers whose place they take."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from blink.kernels import NormAct, PoolNormAct, WhiteningConv2d, backend, convert, interpreting
from blink.kernels.whitening import patch_moments, whitening_weight
from blink.training.data.dataset import pixel_statistics
from tests.oracle import DEVICE
from tests.small import random_images

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish, None: nn.Identity}
FORMATS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def assert_close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance)


def assert_same_training(ours: nn.Module, theirs: nn.Module, x, steps=2):
    """Results, all gradients and all buffers, over some steps of training and one evaluation."""
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for mode in [True] * steps + [False]:
        ours.train(mode), theirs.train(mode)
        inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        results = [module(own) for module, own in zip((ours, theirs), inputs)]
        assert_close(*results)
        upstream = torch.randn_like(results[0])
        for y in results:
            y.backward(upstream)
        assert_close(inputs[0].grad, inputs[1].grad, 1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert_close(p.grad, q.grad, 1e-3)
    for b, c in zip(ours.buffers(), theirs.buffers()):
        assert_close(b, c)


@FORMATS
@pytest.mark.parametrize("weight", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("pool", [False, True], ids=["norm", "pool"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_layers_are_batch_norm_and_activation(activation, pool, weight, layout):
    ours = (PoolNormAct if pool else NormAct)(6, eps=1e-3, momentum=0.3, activation=activation, weight=weight).to(
        DEVICE
    )
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3).to(DEVICE)
    if weight:
        nn.init.uniform_(norm.weight, -1, 1)
    else:
        norm.weight = None
    nn.init.uniform_(norm.bias, -1, 1)
    ours.load_state_dict(norm.state_dict())
    before = [nn.MaxPool2d(2)] if pool else []
    theirs = nn.Sequential(*before, norm, ACTIVATIONS[activation]())
    wrapped = nn.Sequential(*[nn.Identity() for _ in before], ours)
    x = torch.randn(4, 6, 7, 8, device=DEVICE).contiguous(memory_format=layout)
    assert_same_training(wrapped, theirs, x)
    with profile() as calls:
        wrapped(x)
    op = "pool_norm_act" if pool else "excite_norm_act_add"
    assert any(f"blink::{op}" in event.key for event in calls.key_averages()) == (backend(DEVICE) == "fused")


def test_impossible_norms_are_refused():
    with pytest.raises(ValueError, match="PoolNormAct: unknown activation 'tanh'; expected one of None, relu"):
        PoolNormAct(4, activation="tanh")
    with pytest.raises(TypeError, match="NormAct: momentum must be a number from 0 to 1, found None"):
        NormAct(4, momentum=None)


def network() -> nn.Sequential:
    tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.BatchNorm2d(8, eps=1e-3), nn.GELU())
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.SiLU(), tail, nn.BatchNorm2d(8), nn.Tanh()),
        *(nn.BatchNorm2d(8), nn.Hardswish()),
    ).to(DEVICE)


@pytest.mark.parametrize("weight", [True, False])
def test_conversion_changes_no_result(weight):
    theirs = network()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d) and weight:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    ours = copy.deepcopy(theirs)
    held = dict(ours.named_parameters()) | dict(ours.named_buffers())
    report = convert(ours, weight=weight)
    assert report.changed == ["1", "5", "10", "7.2"]
    assert report.left == {"8": "no activation that the ops have follows it"}
    kinds = [type(m) for m in ours.modules() if isinstance(m, NormAct)]
    assert kinds == [NormAct, NormAct, PoolNormAct, NormAct] and isinstance(ours[7][1], nn.Identity)
    kept = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert all(value is held[name] for name, value in kept.items())
    if not weight:
        assert set(held) - set(kept) == {f"{name}.weight" for name in report.changed}
        for name in report.changed:
            theirs.get_submodule(name).weight = None
    assert_same_training(ours, theirs, torch.randn(4, 3, 18, 20, device=DEVICE))


def test_what_conversion_leaves_is_said():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    scaled, frozen = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    nn.init.constant_(scaled.weight, 2.0)
    frozen.weight.requires_grad_(False)
    model = nn.Sequential(
        *(
            Block(),
            nn.BatchNorm2d(4, momentum=None),
            nn.ReLU(),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.ReLU(),
        ),
        *(nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.BatchNorm2d(4), hooked, nn.BatchNorm1d(4), nn.ReLU()),
        *(nn.BatchNorm2d(4), nn.GELU("tanh"), scaled, nn.ReLU(), frozen, nn.ReLU(), nn.BatchNorm2d(4)),
    ).eval()
    report = convert(model, weight=False)
    assert report.changed == ["13", "15"]
    assert model[13].weight is scaled.weight and model[15].weight is frozen.weight and not model[13].training
    assert report.left == {
        "0.norm": "is not in an nn.Sequential, where the order of calls is known",
        "1": "has momentum=None, a cumulative average",
        "3": "has no running statistics",
        "5": "has no bias",
        "7": "it or its activation has hooks",
        "9": "is a BatchNorm1d",
        "11": "no activation that the ops have follows it",
        "17": "no activation that the ops have follows it",
    }


def images_of(count, height, width, seed=0):
    """[N, C, H, W] uint8 as a data set has them."""
    return random_images(count, height, width, seed).permute(0, 3, 1, 2).to(DEVICE)


def normalized(images, module):
    return (images.double() / 255 - module.mean.double()[:, None, None]) / module.std.double()[:, None, None]


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "bias", "negatives"])
def test_fitted_patches_are_white(kernel, kind):
    images = images_of(30, 9, 8)
    activation = "gelu" if kind == "bias" else None
    module = WhiteningConv2d(
        kernel_size=kernel, negatives=kind == "negatives", bias=kind == "bias", activation=activation
    ).to(DEVICE)
    assert module.fit(images, eps=0.0) is module
    mean, std = pixel_statistics(images.permute(0, 2, 3, 1).cpu().numpy())
    assert torch.equal(module.mean.cpu(), mean) and torch.equal(module.std.cpu(), std)
    y = module(images)
    filters = 3 * kernel**2
    z = F.conv2d(normalized(images, module), module.weight.double())
    assert_close(y, F.gelu(z) if activation else z)
    assert y.shape == (30, module.out_channels, 10 - kernel, 9 - kernel)
    assert_close(z[:, :filters].movedim(1, -1).flatten(0, -2).T.cov(correction=0), torch.eye(filters), 1e-4)
    if kind == "negatives":
        assert torch.equal(module.weight[filters:], -module.weight[:filters]) and module.out_channels == 2 * filters
        # numpy, which multiplies in the interpreter, sums a column by where it stands
        assert interpreting() or torch.equal(y[:, filters:], -y[:, :filters])
    if kind == "bias":
        y.sum().backward()
        assert module.bias.grad.shape == (filters,)
    assert [name for name, _ in module.named_parameters()] == (["bias"] if kind == "bias" else [])


@pytest.mark.parametrize("floating", [False, True], ids=["uint8", "floating"])
def test_projection_norm_and_activation_follow(floating):
    images = images_of(6, 9, 8)
    module = WhiteningConv2d(out_channels=5, activation="silu", momentum=0.3).to(DEVICE).fit(images)
    norm = nn.BatchNorm2d(5, momentum=0.3).to(DEVICE)
    x = normalized(images, module).float()
    for training in (True, False):
        module.train(training), norm.train(training)
        y = module(x if floating else images)
        z = F.conv2d(F.conv2d(x, module.weight), module.project.weight)
        assert_close(y, F.silu(norm(z)))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(module.norm, name), getattr(norm, name))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_batches_and_their_order_do_not_matter():
    images = images_of(20, 9, 8)
    labels = torch.arange(20)
    whole = WhiteningConv2d().to(DEVICE).fit(images)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=7, shuffle=True)
    for batches in (loader, [images[13:], images[:13].contiguous(memory_format=torch.channels_last)], iter([[images]])):
        other = WhiteningConv2d().to(DEVICE).fit(batches)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values()))
    few = WhiteningConv2d().to(DEVICE).fit((images[i : i + 5] for i in range(0, 20, 5)), batches=2)
    assert torch.equal(few.weight, WhiteningConv2d().to(DEVICE).fit(images[:10]).weight)


def test_floating_images_give_what_their_pixels_would():
    images = images_of(20, 9, 8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    exact = WhiteningConv2d(mean=mean, std=std).to(DEVICE).fit(images, centered=False)
    assert_close(exact.mean, torch.tensor(mean)), assert_close(exact.std, torch.tensor(std))
    want = whitening_weight(patch_moments(images.permute(0, 2, 3, 1), 2), exact.mean, exact.std, 5e-4, centered=False)
    assert torch.equal(exact.weight, want)
    floating = WhiteningConv2d().to(DEVICE)
    x = normalized(images, exact).float()
    floating.fit([x[:12], x[12:]], centered=False)
    assert_close(floating.weight, exact.weight, 1e-4)
    assert_close(floating(x), exact(images), 1e-4)


def test_the_filters_are_state_and_nothing_runs_without_them():
    images = images_of(5, 6, 6)
    empty = WhiteningConv2d(bias=True).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"no filters yet; call fit\(images\) or load a state_dict first"):
        empty(images)
    fitted = copy.deepcopy(empty).fit(images)
    loaded = WhiteningConv2d(bias=True).to(DEVICE)
    loaded.load_state_dict(fitted.state_dict())
    for other in (loaded, copy.deepcopy(fitted)):
        assert torch.equal(other(images), fitted(images))
    # that of one without filters gives none
    loaded.load_state_dict(empty.state_dict())
    with pytest.raises(RuntimeError, match="no filters yet"):
        loaded(images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "there are no images to fit to"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ValueError, r"must be \[N, 3, H, W\], found \[2, 8, 8, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "must be uint8 or floating, found torch.int64"),
        ([{"image": 1}], ValueError, r"must be \[N, 3, H, W\], found dict"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], ValueError, "found both"),
        (torch.zeros(2, 3, 1, 8), ValueError, "hold no 2x2 patch"),
    ],
)
def test_images_of_no_use_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        WhiteningConv2d().fit(images)


def test_impossible_stems_are_refused():
    with pytest.raises(ValueError, match="mean and std are given together"):
        WhiteningConv2d(mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="mean must have 3 values, found 2"):
        WhiteningConv2d(mean=[0.5, 0.5], std=[1, 1, 1])
    with pytest.raises(ValueError, match="a projection, out_channels=8, needs neither bias nor negatives"):
        WhiteningConv2d(3, 8, bias=True)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        WhiteningConv2d(activation="tanh")


def test_stem_and_norms_are_traced_whole_by_torch_compile():
    images = images_of(4, 9, 8)
    stem = WhiteningConv2d(bias=True, activation="relu").to(DEVICE).fit(images)
    model = nn.Sequential(stem, nn.Conv2d(12, 6, 3), PoolNormAct(6), NormAct(6, activation="gelu")).to(DEVICE).eval()
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images))


def test_the_example_runs():
    """In a process of its own, where nothing is interpreted, for one epoch."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import whitening_resnet as example; example.EPOCHS = 1; example.main()"
    root = Path(__file__).resolve().parent.parent
    env["PYTHONPATH"] = str(root)
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "examples", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(
        r"12 values: (\S+), after whitening (\S+)\n12 filters .* by Muon(?:.*\n)+epoch 1: \d+%", done.stdout
    )
    assert found and float(found[1]) > 0.9 and float(found[2]) < 0.1
