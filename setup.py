"""Installs kernels/ as `blink_kernels`: `kernels` is the import name of another widely used package."""

from setuptools import setup

setup(
    name="blink-cifar",
    version="0.1.0",
    description="Fused Triton kernels for small-image classifiers, and a trainer that races on CIFAR-10 with them",
    license="MIT",
    python_requires=">=3.11",
    package_dir={"blink_kernels": "kernels"},
    packages=["blink_kernels", "blink_kernels._cases", "blink_kernels.bench"],
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
        # numpy: what the interpreter of triton 3.6 works with, for a suite that is the same on all allowed versions
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "matplotlib>=3.9", "numpy<2.4"],
    },
)
