# Two images, `cpu` (small, the default) and `cuda`, from this repository alone; `make docker-test`
# builds and tries the first.
#   docker build -t llm:cpu .
#   docker build -t llm:cuda --target cuda .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 \
#       -v ./runs/demo-dpo:/model:ro llm:cpu
#   docker run --rm llm:cpu train.py --help   # any script here: the entry point is python
#
# BASE has python3 with venv; the same one is under every stage, for a virtual environment points
# at its Python. Behind a mirror or a company's proxy give pip its settings as secrets, which leave
# no trace in the image:
#   docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf \
#       --secret id=ca.pem,src=company.pem .
ARG BASE=python:3.12-slim

# ------------------------------------------------------- what both images are, less their libraries
FROM ${BASE} AS image
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=llm
# Mount points, so that a read-only root needs none made; /cache is anyone's, for the user may be
# changed when it runs.
RUN mkdir -p /model /app/runs /app/data /cache && \
    chown 1000:1000 /app/runs /app/data && chmod 1777 /cache
WORKDIR /app
VOLUME /model
EXPOSE 8000
# A number, for Kubernetes' runAsNonRoot; 1000 because on most machines that is who owns the folders
# that are mounted.
USER 1000:1000
ENTRYPOINT ["python"]
CMD ["serve.py", "/model", "--host", "0.0.0.0", "--port", "8000"]
# /health: the event loop answers; /ready: the model is loaded and its engine lives. A model of
# gigabytes loads for minutes. No proxy is asked. Of a server on another port or with --certificate
# say otherwise: docker run --health-cmd.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-I", "-S", "-c", "from urllib.request import ProxyHandler, build_opener; \
    ask = build_opener(ProxyHandler({})).open; \
    [ask('http://127.0.0.1:8000' + path, timeout=4) for path in ('/health', '/ready')]"]

# --------------------------------------------------------------------------------- libraries: CPU
FROM ${BASE} AS cpu-libraries
# Where torch's CPU wheel is. Empty where pip's own settings know.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONFIG_FILE=/run/secrets/pip.conf
COPY requirements.txt /
# triton compiles for GPUs: a gigabyte that a CPU never opens. Of torch go its own tests, its C++
# headers and the programs that test it; of the others the tests; and pip goes, for nothing is
# installed after this.
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    python3 -m venv /venv && grep -v '^triton' requirements.txt > cpu.txt && \
    /venv/bin/pip install --progress-bar off \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r cpu.txt && \
    /venv/bin/python -c 'import torch; \
        exit(torch.version.cuda and "pip found a torch for CUDA: set TORCH_INDEX")' && \
    /venv/bin/pip check && /venv/bin/pip uninstall -y pip && \
    cd /venv/lib/python3*/site-packages && rm -r torch/test torch/include && \
    find torch/bin -type f ! -name torch_shm_manager -delete && \
    find . -type d -name tests -prune -exec rm -r {} +

# -------------------------------------------------------------------------------- libraries: CUDA
FROM ${BASE} AS cuda-libraries
# PyPI's torch brings the CUDA libraries along, so the host needs only a driver; an older driver:
# .../whl/cu126
ARG CUDA_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONFIG_FILE=/run/secrets/pip.conf
COPY requirements.txt /
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    python3 -m venv /venv && \
    /venv/bin/pip install --progress-bar off \
        ${CUDA_INDEX:+--extra-index-url "$CUDA_INDEX"} -r requirements.txt && \
    /venv/bin/python -c 'import torch; \
        exit(None if torch.version.cuda else "pip found torch without CUDA: set CUDA_INDEX")' && \
    /venv/bin/pip check && /venv/bin/pip uninstall -y pip

# ------------------------------------------------------------------------------------- the program
FROM cpu-libraries AS program
WORKDIR /app
# The C++ forward pass is compiled here, for every level of x86-64: the images get the libraries and
# no C++ compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /app/
RUN /venv/bin/python -m engine.native --out engine/build && /venv/bin/python -m compileall -q .

# -------------------------------------------------------------------------------------- the images
FROM image AS cuda
USER root
# The one compiler: Triton builds a stub against the host's driver when it starts.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
COPY --from=cuda-libraries /venv /venv
COPY --from=program /app /app
# Compiled kernels and the block sizes found best, kept where a volume is mounted. The last two are
# for NVIDIA's runtime.
ENV XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
USER 1000:1000

FROM image AS cpu
COPY --from=cpu-libraries /venv /venv
COPY --from=program /app /app
