"""Packaging of armd-jax: base requirements from requirements.txt, everything optional as an extra."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "armd_jax/__init__.py").read_text())[1]
REQUIREMENTS = [
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip() and not line.startswith("#")
]
DATA = ["pyarrow>=16", "backports.zstd>=1; python_version < '3.14'"]
EVAL = ["lm-eval>=0.4.12"]
IMPORT = ["gguf>=0.19", "protobuf>=4"]
SERVE = ["starlette>=1.0", "uvicorn>=0.30", "prometheus_client>=0.20"]
CLOUD = ["gcsfs>=2026.9", "s3fs>=2026.9"]
STABLEHLO = ["flatbuffers>=24"]  # what `jax.export` writes and reads files with

setup(
    name="armd-jax",
    version=VERSION,
    description="Auto-Regressive Masked Diffusion language models in JAX: training, likelihoods, parallel sampling",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["armd_jax", "armd_jax.*"]),
    package_data={
        "armd_jax": [
            "py.typed",
            "serving/page.html",
            "interop/huggingface/template/*.py",
            "interop/huggingface/template/custom_generate/*.py",
        ]
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "tfds": ["tensorflow-datasets>=4.9.7"],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.17"],
        "cloud": CLOUD,
        # Not among those of the tests: it asks for older versions of protobuf and pyarrow than the others bring.
        "beam": ["apache-beam>=2.77"],
        "serve": SERVE,
        "data": DATA,
        "import": IMPORT,
        "eval": EVAL,
        "stablehlo": STABLEHLO,
        # Under the GPL, and with faiss and scikit-learn; it needs no PyTorch here.
        "mauve": ["mauve-text>=0.4"],
        "judge": ["torch>=2.4", "transformers>=4.44"],
        "benchmark": ["torch>=2.4", "transformers>=4.44"],
        "test": [
            *SERVE,
            *DATA,
            *IMPORT,
            *EVAL,
            *STABLEHLO,
            *CLOUD,
            "gcp-storage-emulator>=2026.7",
            "moto[server]>=5.2",
            "openai>=1.50",
            "playwright>=1.40",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "mypy>=2.0",
            "ruff>=0.14",
            "pyyaml>=6",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "tensorflow-datasets>=4.9.7",
            'libtpu>=0.0.42; sys_platform == "linux" and platform_machine == "x86_64"',
        ],
    },
    entry_points={"console_scripts": ["armd = armd_jax.cli.main:main"]},
)
