# KVFetcher, in two kinds (docker build --target):
#
#   trtllm (the default)  on NVIDIA's Triton image with TensorRT-LLM; engine.kind = "tensorrt_llm"
#   plain                 on Debian, with the embedded torch engine, for CPU hosts and any GPU
#
#   docker build -t kvfetcher .
#   docker build -t kvfetcher:plain --target plain .
#
# python_backends/deploy/compose.yaml runs the first with a store; docs/tensorrt_llm.md says how to size it.
# NVDEC needs the driver capability `video`, set below for both.

# 26.04 to 26.07 carry TensorRT-LLM 1.2.1, which the KV connector is written for. For a reproducible
# build give a digest too: TRITON_TAG=26.07-trtllm-python-py3@sha256:...
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver
ARG TRITON_TAG=26.07-trtllm-python-py3
ARG DEBIAN=12-slim


FROM debian:${DEBIAN} AS plain

# pip's own options, such as an index of CPU-only torch builds.
ARG PIP_ARGS=""
ARG TORCH="torch==2.13.0"

# libpython: Triton's Python stub links it, and Debian's python3 does not bring it.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv libpython3.11 \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/kvfetcher \
 && useradd --no-log-init --uid 10001 --create-home --home-dir /var/lib/kvfetcher kvfetcher

COPY pyproject.toml README.md LICENSE /src/
COPY python_backends /src/python_backends
COPY client /src/client
# hadolint ignore=DL3013
RUN /opt/kvfetcher/bin/pip install --no-cache-dir ${PIP_ARGS} "${TORCH}" "/src[all]" && rm -r /src

COPY model_repository /opt/kvfetcher/model_repository
USER 10001
ENV PATH=/opt/kvfetcher/bin:$PATH \
    KVFETCHER_MODEL_REPOSITORY=/opt/kvfetcher/model_repository \
    KVFETCHER_SERVER_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
VOLUME /var/lib/kvfetcher
EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=5m CMD \
    ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=3)"]
ENTRYPOINT ["kvfetcher"]
CMD ["serve"]


FROM ${TRITON_IMAGE}:${TRITON_TAG} AS trtllm

# The environment that the image's Triton runs its Python models in.
ARG SERVER_VENV=/opt/venv-tritonserver
ARG PIP_ARGS=""

USER 0
RUN useradd --no-log-init --uid 10001 --create-home --home-dir /var/lib/kvfetcher kvfetcher

COPY pyproject.toml README.md LICENSE /src/
COPY python_backends /src/python_backends
COPY client /src/client
# The image's torch, numpy, transformers and all else of TensorRT-LLM's stay as they are.
RUN PIP_ARGS="${PIP_ARGS}" /src/python_backends/deploy/install.sh "${SERVER_VENV}" /src && rm -r /src

COPY model_repository /opt/kvfetcher/model_repository
USER 10001
ENV PATH=${SERVER_VENV}/bin:$PATH \
    KVFETCHER_MODEL_REPOSITORY=/opt/kvfetcher/model_repository \
    KVFETCHER_SERVER_HOST=0.0.0.0 \
    KVFETCHER_ENGINE_KIND=tensorrt_llm \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
VOLUME /var/lib/kvfetcher
EXPOSE 8000 8001 8002
# A large model takes minutes to load.
HEALTHCHECK --start-period=30m CMD \
    ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=3)"]
ENTRYPOINT ["kvfetcher"]
CMD ["serve"]
