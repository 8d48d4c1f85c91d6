# One file, three bases (docs/slurm.md, "Containers"):
#   NVIDIA's PyTorch image, with Transformer Engine and apex inside (the default)
#   a CUDA runtime image:  --build-arg BASE_IMAGE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04
#   CPU:                   --build-arg BASE_IMAGE=python:3.12-slim-bookworm
# What the base brings of torch, Transformer Engine and apex stays as it is; the build fails if torch's version changed.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Only the CUDA runtime images have no Python of their own.
# hadolint ignore=DL3008
RUN if ! python3 -m venv --help >/dev/null 2>&1; then \
      apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-pip \
      && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
# Packages go into an environment on top of the base's own, which stays untouched and visible.
RUN python3 -m venv --system-site-packages /opt/nemo_llm
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY tools/image_requirements.py tools/
# Another index for PyTorch's wheels, such as that of its CPU builds
ARG TORCH_INDEX=
RUN /opt/nemo_llm/bin/python tools/image_requirements.py /tmp/wanted.txt /tmp/constraints.txt \
    && /opt/nemo_llm/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
       -r /tmp/wanted.txt -c /tmp/constraints.txt "hatchling>=1.26"
COPY nemo_llm nemo_llm
COPY conf conf
RUN /opt/nemo_llm/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /opt/nemo_llm/bin/python tools/image_requirements.py --verify /tmp/constraints.txt

FROM base AS final
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_llm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/nemo_llm /opt/nemo_llm
ENV PATH=/opt/nemo_llm/bin:$PATH NEMO_LLM_PYTHON=/opt/nemo_llm/bin/python HYDRA_FULL_ERROR=1 \
    NEMO_LLM_REVISION=${REVISION} HOME=/tmp
# No home folder and nothing to write to in the image: it works read-only, with /work and /tmp mounted.
RUN groupadd --gid 10001 trainer && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp trainer \
    && mkdir /work && chown 10001:10001 /work
USER 10001:10001
WORKDIR /work
HEALTHCHECK --interval=60s --timeout=30s \
    CMD ["python", "-m", "nemo_llm.health", "/tmp/health", "--run-dir", "/work"]
CMD ["python", "-m", "nemo_llm.train", "+model=gpt_tiny"]
