"""The code of README.md and docs/ runs; docs/ops.md says of every op what its file says."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from blink.kernels import dispatch, reference
from blink.kernels.examine.cases import small_cases
from blink.kernels.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
OPS_PAGE = (ROOT / "docs" / "ops.md").read_text()
# each ### section of it
SECTIONS = {part.split("`", 2)[1]: part for part in re.split(r"^### (?=`)", OPS_PAGE, flags=re.MULTILINE)[1:]}


def blocks() -> list:
    """Every piece of Python, under its page and the line that it starts at."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for match in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{page.name}-{line}"))
    return found


@pytest.mark.parametrize("block", blocks())
def test_a_pages_code_runs(block, image_folder, monkeypatch):
    """Each by itself; what it trains is a folder of small images, for one epoch."""
    image_folder.rename(image_folder.with_name("photographs"))
    monkeypatch.chdir(image_folder.parent)
    Image.new("RGB", (30, 20)).save("photograph.jpg")
    exec(block.replace("epochs=20", "epochs=1"), {})


def test_every_op_has_a_section_that_names_its_arguments():
    assert SECTIONS.keys() == OPS.keys()
    for name, section in SECTIONS.items():
        text, *examples = section.split("```python")
        named = re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text)))
        assert set(inspect.signature(getattr(reference, name)).parameters) <= {*named}, name
        assert len(examples) == 1 and ("Saved: " in text) == bool(OPS[name].differentiable), name


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("name", OPS)
def test_the_bytes_that_a_section_counts(name, itemsize):
    """They are formulas in the tensors' bytes, which give what the benchmark counts."""
    case = next(case for case in small_cases() if case.op == name)
    dtype = {2: torch.float16, 4: torch.float32}[itemsize]
    tensors = case.make(torch.device("cpu"), dtype)
    y = case.call(reference, tensors, dtype)
    y = y[0] if isinstance(y, tuple) else y
    sizes = {"itemsize": itemsize}
    for argument, value in case.arguments.items():
        values = value if isinstance(value, list) else [value]
        sizes[argument] = sum(v.bytes(itemsize) for v in values if v is not None)
    if isinstance(y, torch.Tensor):
        sizes["y"] = y.numel() * y.element_size()
    if "weight1" in tensors:
        sizes["hidden"] = 4 * tensors["weight1"].shape[0] * len(next(iter(tensors.values())))
        sizes |= {f"d{weight}": 4 * tensors[weight].numel() for weight in ("weight1", "weight2")}
    stated = " ".join(SECTIONS[name].split("- Bytes", 1)[1].split("\n- ")[0].split())
    forward, *backward = re.findall(r"(?:: |forward |backward )`([^`]*)`", stated)
    counted = case.cost(itemsize)
    # a formula of the project's own page
    assert eval(forward, {}, sizes) == counted["fwd"].bytes
    assert len(backward) >= ("bwd" in counted)
    if "bwd" in counted:
        assert eval(re.search(r"backward `([^`]*)`", stated)[1], {}, sizes) == counted["bwd"].bytes


def test_the_notebook_runs(monkeypatch, capsys):
    """Smaller, and off a GPU in plain PyTorch, as there without Triton's interpreter; its stored outputs are of a run
    of the whole, without a machine's own names.
    """
    if not torch.cuda.is_available():
        monkeypatch.setattr(dispatch, "_CHOICE", "reference")
    notebook = json.loads((ROOT / "examples" / "squeeze_excite.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert not re.search(r"/home|/tmp|/work|/root", json.dumps(cells))
    scope: dict = {}
    for cell in cells:
        exec("".join(cell["source"]).replace("(4, 96, 5)", "(2, 64, 1)"), scope)
    assert (scope["BATCH"], scope["REPEATS"]) == (2, 1) or scope["DEVICE"].type == "cuda"
    printed = capsys.readouterr().out
    assert "16 blocks replaced, 0 left" in printed and "times as fast" in printed
    assert max(scope["differences"]) < 1e-3
