"""What a figure must name: processor or GPU and its power limit, driver, versions, commit."""

import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict:
    """Facts about the machine and the software, ready for JSON; a fact that cannot be read is None."""
    facts = {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "commit": commit(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts |= _gpu_facts(device)
    return facts


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the processor: its vendor and feature flags; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words: set[str] = set()
    for key in ("vendor_id", "flags", "Features"):
        words |= set(next((line for line in lines if line.startswith(key)), ":").partition(":")[2].split())
    return frozenset(words)


def commit() -> str | None:
    """The checkout's commit, with '+' when files differ from it."""
    revision = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if _output("git", "-C", str(_ROOT), "status", "--porcelain", "-uno") else "")


def _gpu_facts(device: torch.device) -> dict:
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    query = "power.limit,driver_version"
    line = _output(
        "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={f'GPU-{uuid}' if uuid else index}"
    )
    power, driver = (part.strip() for part in line.split(",")) if line else (None, None)
    return {"power_limit": power, "driver": driver, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_c_compiler() -> bool:
    """Whether Triton finds the C compiler that it builds its launchers with ($CC, else gcc or clang)."""
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))


def has_cxx_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU ($CXX, else g++ or clang++)."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"]))
