"""Installs this checkout as the package `blink`: each folder beside blink/ becomes a package inside it."""

from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).resolve().parent
_FOLDERS = ("kernels", "model", "training", "inference", "reporting", "experiments")
_VERSION = next(
    line.split('"')[1] for line in (_ROOT / "blink/__init__.py").read_text().splitlines() if "__version__" in line
)
_EXPORT = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"]


def _packages(folder: str) -> list[str]:
    return [f"blink.{folder}", *(f"blink.{folder}.{name}" for name in find_packages(str(_ROOT / folder)))]


setup(
    name="blink-cifar",
    version=_VERSION,
    description="Fused Triton kernels for small-image classifiers, and a trainer that races on CIFAR-10 with them",
    long_description=(_ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    project_urls={"Origin of the system": "https://github.com/tysam-code/hlb-CIFAR10"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={f"blink.{folder}": folder for folder in _FOLDERS},
    packages=["blink", *(name for folder in _FOLDERS for name in _packages(folder))],
    package_data={
        "blink": ["py.typed"],
        "blink.kernels.native": ["*.cpp", "*.hpp"],
        "blink.reporting": ["*.jinja"],
    },
    entry_points={"console_scripts": ["blink = blink.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2",
        "pillow>=10",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.13",
    ],
    extras_require={
        "bench": ["matplotlib>=3.9"],
        "export": _EXPORT,
        "log": ["tensorboard>=2.17", "wandb>=0.19"],
        # before 15 a file could bring code that is run
        "parquet": ["pyarrow>=15"],
        "report": ["jinja2>=3.1", "matplotlib>=3.9"],
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "matplotlib>=3.9", "timm>=1"),
            *("tensorboard>=2.17", "jinja2>=3.1", "pyarrow>=15"),
            *_EXPORT,
            # what the interpreter of triton 3.6 works with, for a suite that is the same on all allowed versions
            "numpy<2.4",
        ],
    },
)
