"""The module SqueezeExcite: torchvision's arguments, numerics and state_dict, through the fused op and without it."""

import copy
import io
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import efficientnet, mobilenetv3
from torchvision.ops import SqueezeExcitation

from blink.kernels import SqueezeExcite, backend, dispatch, reference

# these tests run where triton is not installed, too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = backend(DEVICE) == "fused"
where_fused = pytest.mark.skipif(not FUSED, reason="plain PyTorch runs here")
C, R = 12, 4
ACTIVATIONS = [nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Identity, partial(nn.SiLU, inplace=True)]
GATES = [nn.Sigmoid, nn.Hardsigmoid, partial(nn.Hardsigmoid, inplace=True)]


def pair(*args, **options):
    """(torchvision's, ours with the same weights)"""
    theirs = SqueezeExcitation(C, R, *args, **options).to(DEVICE)
    ours = SqueezeExcite(C, R, *args, **options).to(DEVICE)
    # hard gates saturate on either side
    for name, value in theirs.named_parameters():
        nn.init.normal_(value, std=3.0 if name == "fc2.bias" else 0.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def images(*shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=dtype, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def assert_equal(theirs, ours, x, rtol=1e-4, atol=1e-5):
    """Results and all gradients."""
    results = []
    for layer in (theirs, ours):
        leaf = x.detach().clone().requires_grad_()
        y = layer(leaf)
        y.float().square().sum().backward()
        grads = [parameter.grad for parameter in layer.parameters()]
        results.append([y.detach(), leaf.grad, *grads])
        layer.zero_grad()
    for want, got in zip(*results, strict=True):
        scale = want.abs().max().item() if want.numel() else 1.0
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol * max(1.0, scale))


@pytest.mark.parametrize("scale_activation", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_gate_of_the_kernels(activation, scale_activation):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs, ours = pair(activation, scale_activation=scale_activation)
        x = images(2, C, 3, 4)
        assert_equal(theirs, ours, x)
        assert ("SqueezeExciteFunction" in type(ours(x).grad_fn).__name__) == FUSED


@pytest.mark.parametrize(
    "options",
    [
        {"activation": nn.Mish},
        {"activation": partial(nn.GELU, approximate="tanh")},
        {"activation": nn.PReLU},
        {"activation": lambda: torch.tanh},
        {"scale_activation": nn.Tanh},
    ],
    ids=["mish", "gelu-tanh", "prelu", "function", "tanh-gate"],
)
def test_any_other_callable_works_in_plain_pytorch_and_is_said_once(options):
    dispatch._say.cache_clear()
    with pytest.warns(UserWarning, match="is in no kernel; such a layer runs in plain PyTorch"):
        SqueezeExcite(C, R, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs, ours = pair(**options)
        assert_equal(theirs, ours, images(2, C, 3, 4))


def test_names_of_the_kernels_are_taken_too():
    for name, kind in ((None, nn.Identity), ("relu", nn.ReLU), ("gelu", nn.GELU), ("hardswish", nn.Hardswish)):
        assert type(SqueezeExcite(C, R, name).activation) is kind
    assert type(SqueezeExcite(C, R, scale_activation="hardsigmoid").scale_activation) is nn.Hardsigmoid


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((0, R), {}, ValueError, "input_channels must be an integer of at least 1, found 0"),
        ((C, 2.5), {}, ValueError, "squeeze_channels must be an integer of at least 1, found 2.5"),
        ((C, R), {"activation": "tanh"}, ValueError, "unknown activation 'tanh'; expected one of None, gelu"),
        ((C, R), {"scale_activation": None}, ValueError, "unknown scale_activation None; expected one of hardsigmoid"),
        ((C, R), {"activation": nn.ReLU()}, TypeError, "found the module ReLU(); pass its class"),
        ((C, R), {"activation": 3}, TypeError, "must be a class or a function that makes a module, found 3"),
        (
            (C, R),
            {"activation": nn.functional.relu},
            TypeError,
            "makes a module without arguments: relu() missing",
        ),
        ((C, R), {"activation": dict}, TypeError, "gave {}"),
        ((C, R), {"reduction": 4}, TypeError, "unexpected keyword argument 'reduction'"),
    ],
)
def test_a_wrong_argument_is_refused_in_the_constructor(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SqueezeExcite(*arguments, **options)


def test_an_activation_that_is_changed_later_counts():
    theirs, ours = pair()
    theirs.activation, ours.activation = nn.SiLU(), nn.SiLU()
    assert_equal(theirs, ours, images(2, C, 3, 4))


def test_state_dict_of_a_mobilenet_block_computes_with_its_own_gate():
    """Built with this layer, torchvision's block has the hard gate that its weights were trained for."""
    config = mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1)
    norm = partial(nn.BatchNorm2d, eps=0.001)
    theirs = mobilenetv3.InvertedResidual(config, norm).to(DEVICE).eval()
    layer = partial(SqueezeExcite, scale_activation=nn.Hardsigmoid)
    ours = mobilenetv3.InvertedResidual(config, norm, se_layer=layer).to(DEVICE).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_mbconv_of_efficientnet_is_built_with_it():
    config = efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1)
    theirs, ours = (
        efficientnet.MBConv(config, 0.0, nn.BatchNorm2d, se_layer=layer).to(DEVICE).eval()
        for layer in (SqueezeExcitation, SqueezeExcite)
    )
    assert any(isinstance(module, SqueezeExcite) for module in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    assert_equal(theirs, ours, images(2, 8, 5, 5))


def test_memory_formats(recwarn):
    """An image in any memory gives what torchvision gives, in the memory that it gives it in; the copy is said once."""
    theirs, ours = pair()
    base = images(2, C, 6, 5)
    dispatch._say.cache_clear()
    for x in (base, base.contiguous(), base[:, :, ::2], base.contiguous()[:, :, :, 1:], base.transpose(2, 3)):
        want, got = theirs(x), ours(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        if x.is_contiguous() or x is base:
            assert got.stride() == want.stride()
    said = [str(warning.message) for warning in recwarn if "channels_last" in str(warning.message)]
    message = "squeeze_excite: x is copied into channels_last memory at every call; give it so, and no copy is made"
    assert said == ([message] if FUSED else [])


@pytest.mark.parametrize("shape", [(C, 4, 3), (0, C, 4, 3), (1, C, 1, 1)], ids=["unbatched", "empty", "1x1"])
def test_shapes_of_torchvision(shape):
    theirs, ours = pair()
    assert_equal(theirs, ours, images(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    theirs, ours = (layer.to(dtype) for layer in pair())
    step = torch.finfo(dtype).eps
    assert_equal(theirs, ours, images(2, C, 4, 3, dtype=dtype), rtol=16 * step, atol=16 * step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    theirs, ours = pair()
    for x in (images(2, C, 4, 3), images(2, C, 4, 3, dtype=dtype)):
        with torch.autocast(DEVICE.type, dtype=dtype):
            want, got = theirs(x), ours(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.float(), want.float(), rtol=5e-2, atol=5e-2)


def test_torch_compile_takes_it_whole():
    theirs, ours = pair(nn.Hardswish, nn.Hardsigmoid)
    for x in (images(2, C, 4, 3), images(2, C, 4, 3).contiguous()):
        torch._dynamo.reset()
        assert_equal(theirs, torch.compile(ours, backend="aot_eager", fullgraph=True), x)


def test_traces_and_exports_are_plain_pytorch_for_any_machine():
    theirs, ours = pair()
    x = images(2, C, 4, 3)
    exported = torch.export.export(ours, (x,))
    assert not any("blink" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), theirs(x))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), theirs(x))


def test_an_fx_graph_has_it_as_one_node():
    theirs, ours = pair(scale_activation=nn.Hardsigmoid)
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(C, C, 1).to(DEVICE), ours))
    assert [node.name for node in graph.graph.nodes if node.op == "call_function"] == ["excited"]
    assert_equal(nn.Sequential(graph.get_submodule("0"), theirs), graph, images(2, C, 4, 3))


def test_copies_and_pickles():
    theirs, ours = pair(partial(nn.SiLU, inplace=True), nn.Hardsigmoid)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_equal(theirs, copied, images(2, C, 4, 3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    theirs, ours = pair()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ours

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    assert_equal(theirs, Checkpointed(), images(2, C, 4, 3))


def test_torch_func():
    """Every transform, through the reference: of the input and of the parameters, also under torch.compile."""
    theirs, ours = pair(nn.GELU)
    x, v = images(2, C, 4, 3), images(2, C, 4, 3)

    def loss(layer):
        return lambda x: layer(x).square().sum()

    def of_parameters(layer):
        return lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()

    def results(layer):
        parameters = dict(layer.named_parameters())
        return [
            torch.func.grad(loss(layer))(x),
            torch.func.grad(of_parameters(layer))(parameters),
            torch.func.vmap(layer)(torch.stack([x, v])),
            torch.func.vmap(torch.func.grad(loss(layer)))(torch.stack([x, v])),
            torch.func.vmap(lambda image: layer(image))(x),
            *torch.func.jvp(layer, (x,), (v,)),
            torch.func.vjp(layer, x)[1](v)[0],
            torch.func.jvp(torch.func.grad(loss(layer)), (x,), (v,))[1],
            torch.compile(lambda x: torch.func.vmap(lambda i: layer(i))(x), backend="aot_eager", fullgraph=True)(x),
        ]

    torch.testing.assert_close(results(ours), results(theirs), rtol=1e-4, atol=1e-4)


def test_forward_mode():
    theirs, ours = pair()
    x, v = images(2, C, 4, 3), images(2, C, 4, 3)
    tangents = []
    for layer in (theirs, ours):
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, v))
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


def test_second_derivatives_where_asked_for():
    theirs = SqueezeExcitation(C, R).to(DEVICE)
    ours = SqueezeExcite(C, R, differentiable_twice=True).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, C, 4, 3).requires_grad_()

    def penalty(layer):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()])

    torch.testing.assert_close(penalty(ours), penalty(theirs), rtol=1e-4, atol=1e-4)


@where_fused
def test_second_derivatives_are_refused_elsewhere():
    layer, x = SqueezeExcite(C, R).to(DEVICE), images(2, C, 4, 3).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"squeeze_excite is differentiable once.*differentiable_twice=True"):
        torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()])


def test_help_says_what_a_user_needs():
    for word in ("input_channels", "scale_activation", "channels_last", "differentiable_twice", "Raises", "Hu et al."):
        assert word in SqueezeExcite.__doc__
    assert reference.GATES.keys() == {"sigmoid", "hardsigmoid"}
