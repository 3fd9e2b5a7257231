"""The network: fused and reference are one function of the same parameters, gradients and statistics included."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from blink.kernels import Gather
from blink.kernels.gather import gathered
from blink.model import backend
from blink.model.network import Group, Network, NetworkConfig
from blink.model.whitening import initialize_stem
from blink.training.budget import Budget
from blink.training.data import synthetic
from blink.training.optimizer import Optimizer
from blink.training.recipes import HLB, ParamGroup, Schedule
from tests.oracle import DEVICE

SMALL = NetworkConfig(stem_channels=8, conv_groups=(Group(16), Group(16, depth=0), Group(32)), se_reduction=4)


def make(config: NetworkConfig, which: backend.Backend, classes: int = 10, size: int = 16) -> Network:
    torch.manual_seed(1)
    network = Network(config, classes, (3, size, size), which).to(DEVICE)
    return network.to(memory_format=torch.channels_last)


def generated(count: int, size: int = 16):
    images, labels, _, _ = synthetic.generate(count, 10)
    small = torch.from_numpy(images)[:, 8 : 8 + size, 8 : 8 + size].contiguous().to(DEVICE)
    return small, torch.from_numpy(labels).to(DEVICE)


def train_both(config: NetworkConfig, steps: int, batch: int, rule: str = "sgd"):
    """Both backends from the same weights through the same steps: (networks, losses [steps, 2])."""
    images, labels = generated(steps * batch)
    mean, std = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])
    networks = [make(config, which) for which in (backend.fused(), backend.reference())]
    # gentle enough that rounding is not amplified from step to step, strong enough to move the weights
    groups = (
        ParamGroup("biases", "sgd", 1.2, 0.85, mean_lr=True),
        ParamGroup("filters", rule, 0.3 if rule == "sgd" else 0.05, 0.85, mean_lr=rule == "sgd"),
        ParamGroup("weights", "sgd", 0.3, 0.85, mean_lr=True),
    )
    recipe = replace(HLB, network=config, param_groups=groups, schedule=Schedule())
    which = (backend.fused(), backend.reference())
    optimizers = [Optimizer(n, recipe, Budget(batch, steps, steps), b) for n, b in zip(networks, which)]
    scale = config.logit_scale
    losses = []
    for network in networks:
        initialize_stem(network.stem, images, mean, std, config.whiten_eps)
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        x, y = images[part].permute(0, 3, 1, 2), labels[part]
        pair = []
        for network, optimizer, ops in zip(networks, optimizers, which):
            loss, _ = ops.cross_entropy(network.raw_logits(x), y, label_smoothing=0.2, scale=scale)
            active = optimizer.active(step)
            grads = torch.autograd.grad(loss, optimizer.parameters(active))
            for p, grad in zip(optimizer.parameters(active), grads):
                p.grad = grad
            optimizer.update(list(grads), active, torch.tensor([step], device=DEVICE))
            pair.append(loss.item() / batch)
        losses.append(pair)
    return networks, losses


@pytest.mark.parametrize(
    "changes",
    [{}, {"se_reduction": None}, {"whiten_kernel": 3}, {"whiten_kernel": 3, "whiten_padding": "same"}],
    ids=["hlb", "no-se", "3x3", "3x3-same"],
)
def test_fused_and_reference_train_alike(changes):
    """Logits, losses, every gradient and the running statistics after 3 steps."""
    config = NetworkConfig(**{**vars(SMALL), **changes})
    (fused, plain), losses = train_both(config, steps=3, batch=6)
    start = make(config, backend.reference()).state_dict()
    moved = max(
        ((plain.state_dict()[k] - v).norm() / v.norm()).item() for k, v in start.items() if k.endswith("conv2.weight")
    )
    assert moved > 1e-3, "the weights hardly moved: agreement would prove nothing"
    for ours, theirs in losses:
        assert abs(ours - theirs) <= 1e-4 * theirs
    for (name, a), b in zip(fused.named_parameters(), plain.parameters()):
        if b.requires_grad:
            scale = b.grad.abs().max()
            assert scale > 0, f"{name} got no gradient"
            assert (a.grad - b.grad).abs().max() <= 2e-3 * scale, name
    for (name, a), b in zip(fused.named_buffers(), plain.buffers()):
        assert (a - b).abs().max() <= 1e-3 * max(b.abs().max(), 1e-3), name
    images, _ = generated(4)
    x = images.permute(0, 3, 1, 2)
    for network in (fused, plain):
        network.eval()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-2, atol=1e-3)


def test_first_gradients_agree_closely():
    """Before any weight has moved, errors have not compounded: the bound is that of the ops."""
    (fused, plain), _ = train_both(SMALL, steps=1, batch=8)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters()):
        if b.requires_grad:
            assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max(), name


def test_gates_that_start_constant_start_as_none():
    """A gate that is the same for all images is undone by the BatchNorm after it."""
    images, _ = generated(8)
    x = images.permute(0, 3, 1, 2)
    gated = make(replace(SMALL, gates_start_constant=True, norm_eps=1e-12), backend.reference())
    plain = make(replace(SMALL, se_reduction=None, norm_eps=1e-12), backend.reference())
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if ".se." not in k})
    torch.testing.assert_close(gated(x), plain(x), rtol=1e-4, atol=1e-5)
    usual = make(SMALL, backend.reference())
    usual.load_state_dict(gated.state_dict() | {k: v for k, v in usual.state_dict().items() if "fc2" in k})
    assert not torch.allclose(usual(x), plain(x), rtol=1e-2)


def test_backends_share_checkpoints():
    fused, plain = make(SMALL, backend.fused()), make(SMALL, backend.reference())
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, value in fused.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    plain.load_state_dict(fused.state_dict())


def test_hlb_network_has_the_published_shape():
    """Parameter shapes of hlb-CIFAR10 v0.3.0 and where SE and biases are."""
    network = Network(HLB.network, 10, (3, 32, 32), backend.reference())
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["stem.whiten.weight"] == (12, 3, 2, 2)
    assert shapes["stem.project.weight"] == (32, 12, 1, 1)
    assert shapes["groups.0.conv1.weight"] == (128, 32, 3, 3)
    assert shapes["groups.0.se.fc1.weight"] == (8, 128)
    assert shapes["groups.1.conv1.weight"] == (256, 128, 3, 3)
    assert shapes["groups.2.conv3.weight"] == (512, 512, 3, 3)
    assert shapes["groups.2.se.fc2.weight"] == (512, 32)
    assert shapes["head.weight"] == (10, 512)
    assert not any(name.startswith("groups.1.") and ("se" in name or "conv2" in name) for name in shapes)
    assert not network.stem.whiten.weight.requires_grad
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    convs = 32 * 12 + 9 * (32 * 128 + 2 * 128 * 128 + 128 * 256 + 256 * 512 + 2 * 512 * 512) + 512 * 10
    se = 2 * 128 * 8 + 8 + 128 + 2 * 512 * 32 + 32 + 512
    assert trained == convs + se + (32 + 3 * 128 + 256 + 3 * 512)
    norm = network.groups[0].norm3
    assert (norm.momentum, norm.eps) == (0.8, 1e-12)


def test_compute_dtype_leaves_normalization_in_float32():
    network = Network(HLB.network, 10, (3, 32, 32), backend.reference()).to_compute_dtype(torch.float16)
    for name, p in network.named_parameters():
        low = any(part in name for part in ("conv", "project", "fc", "head"))
        assert p.dtype == (torch.float16 if low else torch.float32), name
    assert all(b.dtype == torch.float32 for b in network.buffers())


@pytest.mark.parametrize("size, classes", [(9, 2), (20, 3), (33, 100)])
def test_any_size_and_class_count(size, classes):
    network = make(SMALL, backend.reference(), classes, size)
    x = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
    assert network(x).shape == (2, classes)


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match=r"too small.*at least 9x9"):
        Network(SMALL, 10, (3, 8, 32), backend.reference())
    Network(NetworkConfig(**{**vars(SMALL), "whiten_padding": "same"}), 10, (3, 8, 8), backend.reference())
    with pytest.raises(ValueError, match="at least 2 classes"):
        Network(SMALL, 1, (3, 16, 16), backend.reference())
    for wrong in ({"whiten_kernel": 4}, {"whiten_padding": 1}, {"se_reduction": 0}):
        with pytest.raises(ValueError):
            NetworkConfig(**wrong)


def test_backend_choice(monkeypatch):
    cpu = torch.device("cpu")
    assert backend.select("auto", cpu).name == backend.select("native", cpu).name == "native"
    assert backend.select("reference", cpu).name == "reference"
    assert backend.select("auto", torch.device("cuda")).name == "fused"
    with pytest.raises(ValueError, match="unknown kernels"):
        backend.select("triton", cpu)
    with pytest.raises(ValueError, match="native kernels are a CPU's"):
        backend.select("native", torch.device("cuda"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    for choice in ("auto", "compiled"):
        with pytest.raises(ValueError, match="needs a C compiler"):
            backend.select(choice, torch.device("cuda"))


def test_padded_stem_matches_a_padded_convolution():
    """'same' pads with zeros in normalized space, an even kernel's extra row and column at the end."""
    for kernel in (2, 3):
        config = NetworkConfig(**{**vars(SMALL), "whiten_kernel": kernel, "whiten_padding": "same"})
        network = make(config, backend.reference())
        images, _ = generated(3)
        initialize_stem(network.stem, images, torch.full((3,), 0.4), torch.full((3,), 0.2), 1e-2)
        captured = []
        network.stem.project.register_forward_pre_hook(lambda m, args, store=captured: store.append(args[0]))
        network.stem(images.permute(0, 3, 1, 2), None, torch.float32)
        x = (images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.2
        low, high = (kernel - 1) // 2, kernel // 2
        want = F.conv2d(F.pad(x, (low, high, low, high)), network.stem.whiten.weight)
        torch.testing.assert_close(captured[0], want, rtol=1e-4, atol=1e-4)
        assert captured[0].shape[2:] == (16, 16)


@pytest.mark.parametrize(
    "changes",
    [{}, {"whiten_padding": "same"}, {"whiten_kernel": 3, "whiten_padding": "same"}],
    ids=["fused", "2x2-same", "3x3-same"],
)
@pytest.mark.parametrize(
    "jitter", [None, torch.tensor([[0.8, 0.1], [1.2, -0.1], [1.1, 0.0]])], ids=["pixels", "jitter"]
)
def test_a_gather_is_the_batch_it_makes(changes, jitter):
    """Both backends, padded and unpadded: the network on the data set equals the network on the built batch."""
    config = NetworkConfig(**{**vars(SMALL), **changes})
    data, _ = generated(6)
    x = data.permute(0, 3, 1, 2)
    mean, std = torch.full((3,), 0.4), torch.full((3,), 0.2)
    gather = Gather(
        torch.tensor([4, 1, 4]),
        translation=torch.tensor([[1, -2], [0, 3], [-3, 0]]),
        flip=torch.tensor([True, False, True]),
        cutout=torch.tensor([[2, 3], [-1, 14], [8, 8]]),
        cutout_size=4,
    )
    gather = Gather(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in vars(gather).items()})
    batch = gathered(x, gather, mean.to(DEVICE))
    if jitter is not None:
        gather = Gather(**{**vars(gather), "jitter": jitter.to(DEVICE)})
    logits = []
    for which in (backend.fused(), backend.reference()):
        network = make(config, which).eval()
        initialize_stem(network.stem, data, mean, std, config.whiten_eps)
        logits.append(network(x, gather))
        assert logits[-1].shape == (3, 10)
        plain = network(batch)
        if jitter is None:
            torch.testing.assert_close(logits[-1], plain)
        else:
            assert (logits[-1] - plain).abs().max() > 1e-3 * plain.abs().max(), "the jitter did nothing"
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
