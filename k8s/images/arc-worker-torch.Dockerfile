# arc-worker-torch: PyTorch with the package arc-topk, for scripts of your own. A base for images with your requirements:
#
#   docker build -f k8s/images/arc-worker-torch.Dockerfile -t arc-topk/arc-worker-torch:0.1.0 .
#
# PyTorch from PyPI brings CUDA's libraries along (several gigabytes). For CPUs alone:
#   --build-arg INDEX=https://download.pytorch.org/whl/cpu
ARG PYTHON=docker.io/library/python:3.12-slim-bookworm
ARG RUST=docker.io/library/rust:1.95.0-bookworm

FROM ${RUST} AS build
ARG MATURIN=1.16.0
RUN apt-get update && apt-get install --yes --no-install-recommends python3-pip python3-venv && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /maturin && /maturin/bin/pip install --no-cache-dir "maturin==$MATURIN"
WORKDIR /src
COPY . .
# For Python 3.11 and whatever comes after it (abi3), so the builder's own version does not matter.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    RUSTFLAGS='-C strip=symbols --remap-path-prefix=/src=. --remap-path-prefix=/usr/local/cargo=cargo' \
    /maturin/bin/maturin build --release --locked --manifest-path worker/python/Cargo.toml --out /wheels \
    && python3 k8s/images/sbom.py arc-topk-python > /wheels/arc-topk.cdx.json

FROM ${PYTHON}
ARG TORCH=2.11.0
ARG INDEX=https://pypi.org/simple
LABEL org.opencontainers.image.title="arc-worker-torch" \
      org.opencontainers.image.description="PyTorch with the package arc-topk" \
      org.opencontainers.image.source="https://github.com/arc-topk/arc-topk" \
      org.opencontainers.image.licenses="Apache-2.0"
# PyTorch asks for the user's name, and this one has none in the image.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=arc LOGNAME=arc
COPY --from=build /wheels/ /usr/share/arc-topk/
RUN pip install --no-cache-dir --index-url "$INDEX" "torch==$TORCH" \
    && pip install --no-cache-dir numpy /usr/share/arc-topk/*.whl
WORKDIR /workspace
USER 65532:65532
STOPSIGNAL SIGTERM
