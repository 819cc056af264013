# An image for GPUs, of the versions in constraints-gpu.txt:
#   docker build -t megatron-sr1 .
#   docker run --gpus all --shm-size 16g -v "$PWD:/workspace" megatron-sr1 grpo CONFIG.yaml
# The base is a plain release of the torch that vLLM is built for. Another will do, named by --build-arg BASE_IMAGE=..., if
# it has Python 3.12, a C++ compiler, and that torch or none. NVIDIA's images have development versions of torch, which no
# pin allows.
ARG BASE_IMAGE=pytorch/pytorch:2.14.0-cuda13.0-cudnn9-devel
FROM ${BASE_IMAGE} AS pinned

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron-sr1
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1

COPY constraints-gpu.txt ./
COPY tools tools
RUN python tools/check_gpu_base.py constraints-gpu.txt

# Complete and hashed: pip has nothing to resolve. What the image has in the wanted version stays.
RUN sed -e '/^# Tests/,$d' constraints-gpu.txt > pinned.txt \
 && grep '^transformer-engine-torch==' constraints-gpu.txt > built.txt \
 && python -m pip install --no-deps --require-hashes --requirement pinned.txt

# Transformer Engine's part for torch is source: C++ against the torch above and the headers of NVIDIA's wheels. Without
# FORCE_BUILD its setup.py takes a wheel from the web that no hash covers.
FROM pinned AS transformer-engine
RUN NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
    python -m pip wheel --no-deps --require-hashes --no-build-isolation --wheel-dir /wheels --requirement built.txt

FROM pinned
RUN --mount=type=bind,from=transformer-engine,source=/wheels,target=/wheels \
    python -m pip install --no-deps /wheels/*.whl

COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_sr1 megatron_sr1
RUN python -m pip install --no-deps --no-build-isolation .
COPY examples examples

RUN useradd --create-home --uid 10001 sr1 && install --directory --owner=sr1 /workspace
USER 10001
WORKDIR /workspace
ENTRYPOINT ["megatron-sr1"]
CMD ["--help"]
