# An image for GPUs. Build it on your vendor's PyTorch image (Python 3.12 or newer, torch, Transformer Engine, apex):
#   docker build --build-arg BASE_IMAGE=<registry>/<pytorch image>:<tag> -t megatron-sr1 .
#   docker run --gpus all --shm-size 16g -v "$PWD:/workspace" megatron-sr1 grpo CONFIG.yaml
# BASE_IMAGE has no default on purpose: the torch in it must be the one that the vLLM release below is built for.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron-sr1

# What the base image compiled for its CUDA libraries stays as it is: the constraint makes pip fail rather than replace
# it. Transformer Engine, where the image lacks it, builds against that torch, hence no build isolation.
RUN python -c "import sys; assert sys.version_info >= (3, 12), 'the base image needs Python 3.12 or newer'" \
 && python -c "import setuptools as s; assert int(s.__version__.split('.')[0]) >= 77, 'it needs setuptools 77 or newer'" \
 && python -m pip list --format=freeze | grep -E '^(torch|transformer.engine.*|apex)==' > constraints.txt \
 && printf '%s\n' megatron-core==0.19.2 vllm==0.33.0 pint==0.25.3 webdataset==1.0.2 >> constraints.txt

COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_sr1 megatron_sr1
RUN python -m pip install --no-cache-dir --no-build-isolation --constraint constraints.txt '.[gpu,track]'

COPY tools tools
COPY examples examples

RUN useradd --create-home --uid 10001 sr1 && install --directory --owner=sr1 /workspace
USER 10001
WORKDIR /workspace
ENTRYPOINT ["megatron-sr1"]
CMD ["--help"]
