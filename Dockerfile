# An image in which ddetr is installed, for CPUs or for GPUs:
#   docker build -t ddetr:0.1.0 .
#   docker build -t ddetr:0.1.0 --build-arg DEVICE=cuda .
# For CPUs, --build-arg TORCH_INDEX=URL with the index of torch's CPU wheels, which pytorch.org names, saves 5 GB.
# Every RUN but those of the system's packages also runs in tests/launch/test_image.py, without an engine.
ARG DEVICE=cpu
ARG TORCH_INDEX=

# g++ builds the op, and serves train.compile at run time; wget is what KubeRay probes a node with.
FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ddetr
WORKDIR /build
COPY constraints.txt pyproject.toml ./

# setup.py compiles CUDA code where it finds nvcc, and needs neither a GPU nor a torch with CUDA for it.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS toolkit-cuda
FROM base AS toolkit-cpu
WORKDIR /usr/local/cuda-13.0
# hadolint ignore=DL3006
FROM toolkit-${DEVICE} AS toolkit

FROM base AS wheel
COPY --from=toolkit /usr/local/cuda-13.0 /usr/local/cuda
ENV TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0;12.0+PTX"
ARG TORCH_INDEX
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip install -c constraints.txt setuptools wheel ninja torch
COPY setup.py README.md LICENSE ./
COPY core core
COPY ops ops
COPY data data
COPY launch launch
COPY monitoring monitoring
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# torch's packages bring the CUDA libraries; the driver comes from the host.
FROM base AS ddetr
ARG TORCH_INDEX
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip install -c constraints.txt setuptools wheel ninja torch torchvision
# On their own, so that a change of the code fetches nothing again.
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*p["dependencies"], *p["optional-dependencies"]["s3"], sep="\n")' >requirements.txt \
    && pip install -c constraints.txt --no-build-isolation -r requirements.txt
COPY --from=wheel /build/dist dist
RUN pip install --no-deps dist/*.whl
USER 1000
WORKDIR /home/ddetr
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["ddetr"]
CMD ["--help"]
