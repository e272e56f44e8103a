# KVFetcher with the embedded torch engine, for CPU hosts and, with --gpus, for GPU hosts.
#
#   docker build -t kvfetcher .
#   docker run --shm-size=2g -p 8000-8002:8000-8002 -v kvfetcher:/var/lib/kvfetcher kvfetcher
#
# For NVDEC, the container needs the capability `video`:
#   docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video ...

ARG DEBIAN=12-slim
FROM debian:${DEBIAN}

# pip's own options, such as an index of CPU-only torch builds.
ARG PIP_ARGS=""
ARG TORCH="torch==2.13.0"

# libpython: Triton's Python stub links it, and Debian's python3 does not bring it.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv libpython3.11 \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/kvfetcher \
 && useradd --create-home --home-dir /var/lib/kvfetcher kvfetcher

COPY pyproject.toml README.md LICENSE /src/
COPY python_backends /src/python_backends
COPY client /src/client
RUN /opt/kvfetcher/bin/pip install --no-cache-dir ${PIP_ARGS} "${TORCH}" "/src[all]" && rm -r /src

COPY model_repository /opt/kvfetcher/model_repository
USER kvfetcher
ENV PATH=/opt/kvfetcher/bin:$PATH \
    KVFETCHER_MODEL_REPOSITORY=/opt/kvfetcher/model_repository \
    KVFETCHER_SERVER_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
VOLUME /var/lib/kvfetcher
EXPOSE 8000 8001 8002
HEALTHCHECK --start-period=5m CMD \
    python3 -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=3)"
ENTRYPOINT ["kvfetcher"]
CMD ["serve"]
