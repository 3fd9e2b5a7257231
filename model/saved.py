"""A trained network as one file that is enough by itself: safetensors, whose metadata says what the tensors are of."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from blink.errors import UserError, brief
from blink.files import from_json, replacing
from blink.model.config import NetworkConfig

if TYPE_CHECKING:
    # a path that leads nowhere is found without PyTorch
    from torch import Tensor

# of the metadata; a file of a later one is refused
FORMAT = 1
_KEY = "blink"
EXPECTED = "expected a .safetensors file that blink train --out wrote"


def save(
    path: Path, state: "dict[str, Tensor]", config: NetworkConfig, classes: tuple[str, ...],
    image_shape: tuple[int, int, int], facts: dict,
) -> None:  # fmt: skip
    """Save a network's state_dict with what is needed to use it, atomically.

    facts: ready for JSON: what else a reader should know, such as recipe, data, accuracy, versions and command.
    Raises UserError where it cannot be written.
    """
    content = {
        "format": FORMAT,
        "network": asdict(config),
        "classes": list(classes),
        "image_shape": list(image_shape),
        **facts,
    }
    write_tensors(path, state, {_KEY: json.dumps(content), "model_card": model_card(content)})


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """A safetensors file of these, written atomically. Raises UserError where it cannot be written."""
    from safetensors.torch import save as serialized

    metadata = {"format": "pt", **metadata}
    try:
        with replacing(path) as temporary:
            # written here, because safetensors' own files can be read by their owner only, whatever the umask
            temporary.write_bytes(serialized({name: value.contiguous() for name, value in tensors.items()}, metadata))
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {path} ({error}); free some space or name another folder") from error


def model_card(content: dict) -> str:
    """What a person should know of a saved network, as Markdown."""
    channels, height, width = content["image_shape"]
    data, names = content.get("data") or {}, content["classes"]
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    lines = [f"# {(content.get('recipe') or {}).get('name', 'A network')} on {data.get('name', 'unnamed data')}", ""]
    lines += [f"Classifies images of {height}x{width} pixels in {channels} channels: {shown}.", ""]
    if "accuracy" in content:
        tested = f"accuracy on {data['test']:,} test images, averaged over views of them"
        lines.append(f"- {tested}: {content['accuracy']:.4f}")
    if "fingerprint" in data:
        lines.append(f"- data: {data['name']}, fingerprint {data['fingerprint']}, {data['train']:,} training images")
    if data.get("generated"):
        lines.append("- the images are generated: its accuracy means nothing elsewhere")
    if content.get("command"):
        lines.append(f"- command: {' '.join(content['command'])}")
    if "versions" in content:
        lines.append("- versions: " + ", ".join(f"{name} {version}" for name, version in content["versions"].items()))
    lines += ["", "Use: `blink predict FILE IMAGE...`, or `blink.load(FILE).predict([IMAGE])` in Python."]
    return "\n".join(lines).encode(errors="replace").decode()


def no_network(path: Path) -> UserError:
    return UserError(f"there is no {path}; {EXPECTED}")


def read(path: Path, weights: bool = True) -> "tuple[dict, dict[str, Tensor]]":
    """(what `save` was told, the state_dict); nothing in the file is executed. Raises UserError for no such file.

    weights: False leaves them where they are, and the state_dict empty.
    """
    try:
        with safe_open(path, "pt") as file:
            content = from_json((file.metadata() or {})[_KEY])
            state = {name: file.get_tensor(name) for name in (file.keys() if weights else ())}
        later = content["format"] > FORMAT
    except FileNotFoundError as error:
        raise no_network(path) from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = "no description of a network" if isinstance(error, KeyError) else brief(error)
        raise UserError(f"{path} is no saved network ({reason}); {EXPECTED}") from error
    if later:
        raise UserError(f"{path} is of a later version of blink (format {content['format']}); update blink")
    return content, state
