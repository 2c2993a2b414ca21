# dschat in a container, for a CPU; without TORCH_INDEX pip's default torch brings gigabytes of CUDA:
#     docker build -t dschat --build-arg TORCH_INDEX=ADDRESS .       (pytorch.org's "Get Started" page: pip, CPU)
# For NVIDIA GPUs, with pip's default torch and the compiler for DeepSpeed's operators:
#     docker build -t dschat --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
# Then, with --gpus all for GPUs:
#     docker run --rm -it --shm-size 8g -v "$PWD:/work" -w /work dschat demo
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/dschat
COPY requirements.txt ./
ARG TORCH_INDEX
RUN python3 -m venv .venv && PIP_EXTRA_INDEX_URL=${TORCH_INDEX} .venv/bin/pip install --no-cache-dir -r requirements.txt
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENV PATH=/opt/dschat/.venv/bin:$PATH
ENTRYPOINT ["dschat"]
