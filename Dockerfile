# An image for GPUs. Build it on your vendor's PyTorch image (Python 3.12 or newer, torch, Transformer Engine):
#   docker build --build-arg BASE_IMAGE=<registry>/<pytorch image>:<tag> -t megatron-sr1 .
#   docker run --gpus all --shm-size 16g -v "$PWD/runs:/workspace/runs" megatron-sr1 grpo CONFIG.yaml
# BASE_IMAGE has no default on purpose: the version of torch in it must be the one that the vLLM release is built for.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

WORKDIR /opt/megatron-sr1
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_sr1 megatron_sr1
COPY tools tools
COPY examples examples

# The torch of the base image is compiled for its CUDA libraries: the constraint makes pip fail rather than replace it.
# Transformer Engine builds against that torch, hence no build isolation.
RUN python -c "import sys, torch; assert sys.version_info >= (3, 12); print('torch==' + torch.__version__)" > /tmp/torch.txt \
 && python -m pip install --no-cache-dir --no-build-isolation --constraint /tmp/torch.txt '.[gpu]' \
 && rm /tmp/torch.txt

RUN useradd --create-home --uid 10001 sr1 && mkdir /workspace/runs -p && chown -R sr1 /workspace
USER sr1
WORKDIR /workspace
ENTRYPOINT ["megatron-sr1"]
CMD ["--help"]
