"""replace_squeeze_excitation: a published model with its blocks swapped is the same function, whatever is done with it.

The published models run in float64, and so on the reference: in float32 their batch normalization makes much of a
rounding. The fused op inside a model is tested on one of two narrow blocks, and on a GPU in the published ones too.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import SqueezeExcitation

from blink.kernels import SqueezeExcite, replace_squeeze_excitation

# these tests run where triton is not installed, too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the number of blocks that each has
MODELS = {
    "efficientnet_b0": 16,
    "efficientnet_v2_s": 30,
    "mobilenet_v3_large": 8,
    "mobilenet_v3_small": 9,
    "regnet_y_400mf": 16,
}
FORMATS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers this small lose more than they gain by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(layout=torch.channels_last, size=64, dtype=torch.float64):
    return torch.randn(2, 3, size, size, dtype=dtype, device=DEVICE).contiguous(memory_format=layout)


def pair(model: nn.Module, **options):
    """The model and a copy of it with its blocks swapped."""
    patched = copy.deepcopy(model)
    result = replace_squeeze_excitation(patched, **options)
    assert result.replaced and not result.left
    return model, patched


def prepared(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """In evaluation, normalizing by x's statistics: by the initial ones all values would vanish on their way."""
    model = model.to(DEVICE, x.dtype, memory_format=torch.channels_last).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        model(x)
    return model.eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    x = images()
    return prepared(models.mobilenet_v3_small(num_classes=5), x), x


def published(name: str) -> nn.Module:
    """Of the largest one, a block a stage."""
    if name != "efficientnet_v2_s":
        return getattr(models, name)(num_classes=5)
    stages, last_channel = models.efficientnet._efficientnet_conf(name)
    for stage in stages:
        stage.num_layers = 1
    return models.EfficientNet(stages, dropout=0.2, last_channel=last_channel, num_classes=5)


def step(model, x):
    """Everything that a training step makes: the result, the gradients, the buffers."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    grads = {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"y": y.detach(), "gradient x": x.grad, **grads, **buffers}


def assert_close(got, want, tolerance):
    """Relative to each tensor's largest value, or to a thousandth of all of its kind: some are 0 but for rounding."""
    assert got.keys() == want.keys()
    kinds = {name: "gradient" if name.startswith("gradient") else name.split(".")[-1] for name in want}
    largest = {kind: max(want[n].abs().max().item() for n, k in kinds.items() if k == kind) for kind in kinds.values()}
    for name, value in want.items():
        scale = max(value.abs().max().item(), 1e-3 * largest[kinds[name]])
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_every_block_of_published_models_is_found(name):
    # RegNet computes its widths with tensors, which have no values on the meta device
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = getattr(models, name)()
    keys = list(model.state_dict())
    result = replace_squeeze_excitation(model)
    assert len(result.replaced) == MODELS[name] and result.left == {}
    assert all(isinstance(model.get_submodule(block), SqueezeExcite) for block in result.replaced)
    assert not any(isinstance(module, SqueezeExcitation) for module in model.modules())
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.float64] + ([torch.float32] if DEVICE.type == "cuda" else []))
@pytest.mark.parametrize("name", MODELS)
def test_published_models(name, dtype):
    """Results and gradients in evaluation and in training; the same state_dict, loaded both ways."""
    x = images(dtype=dtype)
    model, patched = pair(prepared(published(name), x))
    assert list(patched.state_dict()) == list(model.state_dict())
    patched.load_state_dict(model.state_dict())
    model.load_state_dict(patched.state_dict())
    assert_close(step(patched, x), step(model, x), 1e-9 if dtype == torch.float64 else 1e-3)
    if dtype == torch.float64:
        assert_close(step(patched.train(), x), step(model.train(), x), 1e-9)


def test_a_contiguous_model_stays_contiguous(small):
    small, x = small
    model, patched = (module.to(memory_format=torch.contiguous_format) for module in pair(copy.deepcopy(small)))
    strides = []
    for module in (model, patched):
        module.features[4].register_forward_hook(lambda module, args, y: strides.append(y.stride()))
    assert_close(step(patched, x.contiguous()), step(model, x.contiguous()), 1e-9)
    assert strides[0] == strides[1] and strides[0][-1] == 1


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet", "regnety_002"])
def test_models_of_timm(name):
    import timm

    if name == "resnet":
        blocks = {"block": timm.models.resnet.BasicBlock, "layers": [1, 1, 1, 1], "block_args": {"attn_layer": "se"}}
        model = timm.models.resnet.ResNet(**blocks, num_classes=5)
    else:
        model = timm.create_model(name, num_classes=5)
    x = images()
    model, patched = pair(prepared(model, x))
    assert list(patched.state_dict()) == list(model.state_dict())
    patched.load_state_dict(model.state_dict())
    assert_close(step(patched, x), step(model, x), 1e-9)


class TimmLike(nn.Module):
    """A block with the layers that timm's have, under their names."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.act1 = nn.SiLU(inplace=True)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


NAMES = ("conv_reduce", "act1", "conv_expand", "gate")


def narrow(norm=True):
    """Two blocks, torchvision's and one with timm's names, small enough for the interpreter."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        SqueezeExcitation(8, 4, nn.Hardswish, nn.Hardsigmoid),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        TimmLike(8, 3),
        nn.Flatten(),
    ).to(DEVICE)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_layout_of_ones_own_and_the_fused_op(layout):
    model, patched = pair(narrow(), also={TimmLike: NAMES})
    assert [type(patched[i]) for i in (1, 3)] == [SqueezeExcite] * 2
    x = images(layout, 6, torch.float32)
    assert_close(step(patched, x), step(model, x), 1e-4)


def test_a_block_stays_itself():
    """The object, its parameters, hooks, mode and what refers to it."""
    model = narrow().eval()
    block, parameters = model[1], list(model.parameters())
    calls = []
    block.register_forward_hook(lambda module, args, y: calls.append("forward"))
    block.register_full_backward_hook(lambda module, grads, upstream: calls.append("backward"))
    block.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert replace_squeeze_excitation(model).replaced == ["1"]
    assert model[1] is block and block.training and not model.training
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    model(images(size=6, dtype=torch.float32)).sum().backward()
    assert calls == ["forward", "backward"]
    before = block.fc1.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, block.fc1.weight)


def test_a_block_that_is_the_model_or_has_two_names():
    block = SqueezeExcitation(8, 4)
    assert replace_squeeze_excitation(block) == ([""], {}) and type(block) is SqueezeExcite
    shared = SqueezeExcitation(8, 4)
    model = nn.Sequential(shared, shared)
    assert replace_squeeze_excitation(model).replaced == ["0"] and type(model[1]) is SqueezeExcite
    # nothing is left to do
    assert replace_squeeze_excitation(model) == ([], {})


def changed(change):
    block = SqueezeExcitation(8, 4)
    change(block)
    return block


class Derived(SqueezeExcitation):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    "block, reason",
    [
        (SqueezeExcitation(8, 4, nn.Mish), r"no kernel has Mish\(\)"),
        (SqueezeExcitation(8, 4, lambda: nn.GELU("tanh")), "no kernel has GELU"),
        (SqueezeExcitation(8, 4, scale_activation=nn.Tanh), r"no kernel has Tanh\(\)"),
        (changed(lambda b: b.fc1.register_forward_hook(print)), "hooks on fc1"),
        (changed(lambda b: nn.utils.parametrizations.weight_norm(b.fc1)), "fc1 is a ParametrizedConv2d"),
        (changed(lambda b: setattr(b, "fc1", nn.Conv2d(8, 4, 1, bias=False))), "fc1 has no bias"),
        (changed(lambda b: setattr(b, "fc2", nn.Conv2d(4, 8, 3, padding=1))), "fc2 is not a plain 1x1 convolution"),
        (changed(lambda b: setattr(b, "forward", torch.relu)), "its forward is replaced"),
        (changed(lambda b: delattr(b, "activation")), "it has no layer activation"),
        (Derived(8, 4), "Derived may compute something else than its base class"),
    ],
)
def test_what_is_left_and_why(block, reason):
    model = nn.Sequential(SqueezeExcitation(8, 4), block)
    kind = type(block)
    result = replace_squeeze_excitation(model)
    assert result.replaced == ["0"] and list(result.left) == ["1"] and type(model[1]) is kind
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result.left["1"])


@pytest.mark.parametrize("also", [{TimmLike: "gate"}, {TimmLike: NAMES[:3]}, {"TimmLike": NAMES}])
def test_wrong_arguments(also):
    with pytest.raises(TypeError, match="also must map a class to the names of its four layers"):
        replace_squeeze_excitation(narrow(), also)
    with pytest.raises(TypeError, match="model must be a module, found str"):
        replace_squeeze_excitation("model")


def test_compiled_exported_traced_and_copied(small):
    model, x = small
    patched = pair(model)[1]
    with torch.no_grad():
        want = model(x)
        torch._dynamo.reset()
        buffer = io.BytesIO()
        torch.save(patched, buffer)
        buffer.seek(0)
        for name, same in (
            ("compiled", torch.compile(patched, backend="aot_eager", fullgraph=True)),
            ("exported", torch.export.export(patched, (x,)).module()),
            ("traced", torch.jit.trace(patched, x)),
            ("fx", torch.fx.symbolic_trace(patched)),
            ("deepcopy", copy.deepcopy(patched)),
            ("pickle", pickle.loads(pickle.dumps(patched))),
            ("torch.save", torch.load(buffer, weights_only=False)),
        ):
            torch.testing.assert_close(same(x), want, msg=lambda m, n=name: f"{n}: {m}")


def test_feature_extraction(small):
    """By the names that the unpatched model has."""
    names = ["features.1.block.1", "features.4", "avgpool"]
    small, x = small
    want, got = (create_feature_extractor(model, names)(x) for model in pair(small))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, patched = pair(narrow(norm=False), also={TimmLike: NAMES})
    x = images(size=6, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=dtype):
        want, got = step(model, x), step(patched, x)
    assert got["y"].dtype == want["y"].dtype
    assert_close({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in want.items()}, 0.05)


def test_the_fused_op_compiled_and_checkpointed():
    model, patched = pair(narrow(), also={TimmLike: NAMES})
    x = images(size=6, dtype=torch.float32)
    want = step(model, x)
    torch._dynamo.reset()
    compiled = step(torch.compile(patched, backend="aot_eager", fullgraph=True), x)
    compiled = {name.replace("_orig_mod.", ""): value for name, value in compiled.items()}
    assert_close(compiled, want, 1e-4)
    fresh = pair(narrow(), also={TimmLike: NAMES})[1]
    x = x.clone().requires_grad_()
    y = checkpoint_sequential(fresh, 2, x, use_reentrant=False)
    y.square().mean().backward()
    assert_close({"y": y.detach(), "gradient x": x.grad}, {name: want[name] for name in ("y", "gradient x")}, 1e-4)


def test_distributed_data_parallel(tmp_path):
    model, patched = pair(narrow(), also={TimmLike: NAMES})
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(patched)
        x = images(size=6, dtype=torch.float32)
        want = step(model, x)
        got = {name.replace("module.", ""): value for name, value in step(parallel, x).items()}
        assert_close(got, want, 1e-4)
    finally:
        torch.distributed.destroy_process_group()
