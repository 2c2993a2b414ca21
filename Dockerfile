# dschat in a container: docker build -t dschat . for a CPU;
# docker build -t dschat --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH_INDEX= . for GPUs.
#     docker run --rm -it --shm-size 8g -v "$PWD:/work" -w /work dschat demo
ARG BASE=ubuntu:24.04
FROM ${BASE}
# The index of torch's CPU build, as pytorch.org's "Get Started" page shows it; empty takes pip's default build.
ARG TORCH_INDEX
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/dschat
COPY requirements.txt pyproject.toml setup.py README.md LICENSE ./
RUN python3 -m venv .venv && PIP_EXTRA_INDEX_URL=${TORCH_INDEX} .venv/bin/pip install --no-cache-dir -r requirements.txt
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENV PATH=/opt/dschat/.venv/bin:$PATH
ENTRYPOINT ["dschat"]
