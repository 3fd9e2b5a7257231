"""Every test's ground: the interpreter where there is no GPU, fixed seeds, full float32, NaN in fresh memory."""

import importlib.util
import os

import pytest
import torch

# read once, when the kernels are imported: it must be set before any test module imports them
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.interpreter import patch_once_a_launch

        patch_once_a_launch()

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: nothing here can capture or time CUDA work"))


def pytest_configure(config):
    if getattr(config.option, "dist", "no") == "load":
        # a file's tests share a process (pytest -n), and with it what its fixtures make
        config.option.dist = "loadfile"
    if "PYTEST_XDIST_WORKER" in os.environ:
        # as many processes as cores
        torch.set_num_threads(1)
    config.addinivalue_line("markers", "gpu: needs a GPU")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialized memory holds NaN (integers: a large value), so that a kernel that skips an element is caught."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def image_folder(tmp_path, monkeypatch):
    """A folder of 40 training and 20 test images of 12x12, with a cache of its own."""
    from PIL import Image

    from blink.training.data import synthetic

    monkeypatch.setenv("BLINK_CACHE", str(tmp_path / "cache"))
    images, labels, test_images, test_labels = synthetic.generate(40, 20)
    for half, pixels, numbers in (("train", images, labels), ("test", test_images, test_labels)):
        for i, (image, label) in enumerate(zip(pixels, numbers)):
            folder = tmp_path / "images" / half / synthetic.CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[8:20, 8:20]).save(folder / f"{i:04}.png")
    return tmp_path / "images"
