"""Every launch of every case, and of one step and one evaluation of every recipe, through Triton's own binder.

    python -m tests.bound_launches

prints JSON: how many specializations were compared, and what of each differs from what is compiled ahead, or why it
cannot be launched. For a process without TRITON_INTERPRET, where kernels are plain functions. Needs no device.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from blink.kernels import compile_ahead
from blink.kernels.examine import ahead_of_time, cases
from blink.kernels.examine.ahead_of_time import kernel_name, source_of
from blink.kernels.launching import Launch
from blink.model import backend
from blink.training.budget import plan_budget
from blink.training.precision import Precision
from blink.training.recipes import RECIPES, with_network
from blink.training.trainer import Trainer
from tests.small import small_dataset

_BACKEND = make_backend(GPUTarget("cuda", 90, 32))


def of_cases() -> Iterator[tuple[str, Launch]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in cases.small_cases() + cases.network_cases(4):
            for launch in ahead_of_time.capture(case, dtype):
                yield f"{case.op} {case.label} {dtype}", launch


def of_recipes() -> Iterator[tuple[str, Launch]]:
    """Of narrow networks, what compiling ahead records."""
    dataset = small_dataset(32, 8, 32)
    found: list[Launch] = []
    compile_ahead.compile_launches = found.extend
    for recipe in RECIPES.values():
        groups = tuple(replace(group, channels=group.channels // 8) for group in recipe.network.groups)
        narrow = with_network(recipe, groups=groups)
        budget = plan_budget(narrow, len(dataset.train_images), batch_size=8, steps=5)
        fp16 = Precision("fp16", torch.float16, torch.float16)
        Trainer(narrow, dataset, budget, backend.fused(), fp16, graph=False).compile_ahead(0)
        yield from ((f"recipe {recipe.name}", launch) for launch in found)
        found.clear()


def bound(launch: Launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) by Triton's own binder. Raises what a launch would raise."""
    kernel = launch.kernel
    keywords = {"debug": False, "instrumentation_mode": "", **launch.options}
    binder = create_function_from_signature(kernel.signature, kernel.params, _BACKEND)
    arguments, specialization, options = binder(*launch.arguments, **keywords)
    _, *source = kernel._pack_args(_BACKEND, keywords, arguments, specialization, options)
    if hasattr(driver, "make_launcher"):
        # where a launcher is C code of its own, it is written from the same signature
        driver.make_launcher(source[1], source[0], None)
    return tuple(source)


def differences(launch: Launch) -> list[str]:
    try:
        theirs = bound(launch)
    except Exception as error:
        return [f"cannot be launched: {type(error).__name__}: {error}"]
    ours = source_of(launch)
    out = []
    for name, launched in zip(("signature", "constants", "attrs"), theirs):
        # an attribute that says nothing is none
        one, other = ({k: v for k, v in d.items() if v != []} for d in (launched, getattr(ours, name)))
        out += [
            f"{name} {k}: launched {one.get(k)}, compiled {other.get(k)}"
            for k in one.keys() | other.keys()
            if one.get(k) != other.get(k)
        ]
    return out


def main() -> None:
    seen, found, recipes = set(), {}, set()
    for source in (of_cases(), of_recipes()):
        for where, launch in source:
            recipes |= {where} if where.startswith("recipe") else set()
            key = (source_of(launch).hash(), launch.num_warps)
            if key not in seen:
                seen.add(key)
                if wrong := differences(launch):
                    found[f"{kernel_name(launch)} of {where}"] = wrong
    print(json.dumps({"specializations": len(seen), "recipes": sorted(recipes), "found": found}))


if __name__ == "__main__":
    main()
