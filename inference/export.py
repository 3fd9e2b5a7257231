"""The work of `blink export`; commands/export.py has its arguments."""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from blink.errors import UserError
from blink.files import check_output, write
from blink.inference.classifier import Classifier, load
from blink.inference.labelled import some_images
from blink.inference.shared import printable
from blink.model import backend
from blink.model.saved import model_card
from blink.training.bars import bars

# what ONNX takes
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_CHECKED = 100
# of the largest result, or of 1 where all are smaller
TOLERANCE = 1e-5


class Exported(nn.Module):
    """What is written: images [B, C, height, width] uint8 -> logits or probabilities [B, classes] float32."""

    def __init__(self, model: Classifier, probabilities: bool):
        super().__init__()
        self.model, self.probabilities = model, probabilities

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits.softmax(1) if self.probabilities else logits

    @property
    def output(self) -> str:
        return "probabilities" if self.probabilities else "logits"


def run(options: argparse.Namespace) -> int:
    if options.onnx is None and options.torch_export is None:
        raise UserError("nothing to write; give --onnx FILE or --torch-export FILE")
    if options.onnx is not None:
        if options.torch_export is not None and options.onnx.resolve() == options.torch_export.resolve():
            raise UserError("--onnx and --torch-export name one file; name two")
        need_libraries()
    check_output(options.onnx)
    check_output(options.torch_export)
    # standard operators, whatever this machine's kernels, against what the network runs on where there is no GPU
    module = Exported(load(options.model, "cpu", backend.eager()), options.probabilities).eval()
    original = Exported(load(options.model, "cpu", "reference"), options.probabilities).eval()
    images, source = check_images(options.data, original.model)
    with torch.inference_mode():
        expected = original(images)
    program, made = traced(module, images), []
    if options.onnx is not None:
        content = as_onnx(program, module)
        made.append((options.onnx, "ONNX", content, checked(options.onnx, onnx_runner(content), images, expected)))
    if options.torch_export is not None:
        content, path = as_archive(program, module), options.torch_export
        made.append((path, "torch.export", content, checked(path, archive_runner(content), images, expected)))
    print(printable(f"checked on {source}"))
    for path, kind, content, difference in made:
        write(path, content)
        differs = f"{module.output} differ by {difference:.1e} at most, of {expected.abs().max():.2f}"
        print(printable(f"{path}: {kind}, {len(content) / 1e6:.1f} MB, {differs}"))
    return 0


def need_libraries() -> None:
    """Raises UserError where one that ONNX needs is not installed."""
    try:
        for name in _LIBRARIES:
            __import__(name)
    except ImportError as error:
        raise UserError(f"--onnx needs another package ({error}); pip install {' '.join(_LIBRARIES)}") from error


def check_images(source: str | None, model: Classifier) -> tuple[Tensor, str]:
    """([N, C, H, W] uint8, what they are): images of `source`, else noise, and noise enlarged from 4x4 pixels.

    Raises UserError for a source that cannot be read.
    """
    if source is None:
        channels, height, width = model.image_shape
        generator, half = torch.Generator().manual_seed(0), _CHECKED // 2
        noise = torch.randint(256, (half, channels, height, width), generator=generator, dtype=torch.uint8)
        coarse = 255 * torch.rand(half, channels, 4, 4, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        return torch.cat([noise, smooth.round().byte()]), f"{_CHECKED} generated images, noise and smooth ones (--data)"
    console = Console()
    with bars(console) as bar:
        task = bar.add_task("decoding images", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        images, notes = some_images(source, model, _CHECKED, progress)
    return images, "; ".join([f"{len(images)} images of {source}", *notes])


def traced(module: Exported, images: Tensor) -> torch.export.ExportedProgram:
    """The module as a graph of PyTorch's operators, for any number of images."""
    # contiguous, as readers expect weights to be
    module.to(memory_format=torch.contiguous_format)
    example = images[:1].expand(2, -1, -1, -1).contiguous()
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        # where this package lies on this machine is nobody's business
        node.meta.pop("stack_trace", None)
    return program


def metadata(module: Exported) -> dict[str, str]:
    """What a user of the file must know, by name."""
    model = module.model
    return {
        "classes": json.dumps(model.classes),
        "image_shape": json.dumps(model.image_shape),
        "output": module.output,
        "model_card": model_card(model.facts),
        "blink": json.dumps(model.facts),
    }


def as_onnx(program: torch.export.ExportedProgram, module: Exported) -> bytes:
    """An ONNX model, input `images`, output `logits` or `probabilities`, with `metadata` as its metadata_props."""
    import onnx

    facts = metadata(module)
    made = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=[module.output],
        dynamic_shapes={"images": {0: "batch"}}, verbose=False,
    ).model_proto  # fmt: skip
    graph = made.graph
    for part in (made, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        # the exporter's notes on how it found its way
        del part.metadata_props[:]
    made.producer_name, made.doc_string = "blink", facts["model_card"]
    onnx.helper.set_model_props(made, facts)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def as_archive(program: torch.export.ExportedProgram, module: Exported) -> bytes:
    """What torch.export.load reads, with `metadata` as its extra files."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=metadata(module))
    return file.getvalue()


def archive_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(torch.export.load(io.BytesIO(content)).module())


def checked(path: Path, call: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor) -> float:
    """The largest difference from what is expected, of one image and then of the others at once.

    Raises UserError if it is more than `TOLERANCE` allows.
    """
    found = torch.cat([call(part) for part in (images[:1], images[1:]) if len(part)])
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    # a NaN is no agreement either
    if not difference <= allowed:
        raise UserError(
            f"{path} was not written: its results differ from the network's by {difference:.2g}, expected at most "
            f"{allowed:.2g}"
        )
    return difference
