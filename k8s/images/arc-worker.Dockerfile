# arc-worker: the built-in trainer. Build it in the repository's root:
#
#   docker build -f k8s/images/arc-worker.Dockerfile -t arc-topk/arc-worker:0.1.0 .                        CPU (the last stage)
#   docker build -f k8s/images/arc-worker.Dockerfile --target cuda -t arc-topk/arc-worker:0.1.0-cuda .     on CUDA's runtime
#
# The built-in trainer computes on the CPU, whichever it stands on; the base is for trainers of your own that use the GPU.
#
# The stage `prebuilt` needs no base image, and a static binary built outside (README.md beside this file).
# What a binary that was built outside stands on: nothing, if it is static.
ARG BASE=scratch
ARG RUST=docker.io/library/rust:1.95.0-bookworm
ARG DEBIAN=docker.io/library/debian:bookworm-slim
ARG CUDA=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${RUST} AS build
WORKDIR /src
COPY . .
# Linked to glibc, since it looks up names. bookworm's is older than those below.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    RUSTFLAGS='-C strip=symbols --remap-path-prefix=/src=. --remap-path-prefix=/usr/local/cargo=cargo' \
       cargo build --release --locked -p arc-topk-worker --bin arc-worker \
    && mkdir -p /root-of-image/usr/local/bin /root-of-image/usr/share/sbom \
    && cp target/release/arc-worker /root-of-image/usr/local/bin/ \
    && python3 k8s/images/sbom.py arc-topk-worker > /root-of-image/usr/share/sbom/arc-worker.cdx.json

FROM ${BASE} AS prebuilt
COPY --chmod=0555 target/image/arc-worker /usr/local/bin/arc-worker
COPY --chmod=0444 target/image/arc-worker.cdx.json /usr/share/sbom/arc-worker.cdx.json
USER 65532:65532
EXPOSE 9400/tcp
ENTRYPOINT ["/usr/local/bin/arc-worker"]

FROM ${CUDA} AS cuda
LABEL org.opencontainers.image.title="arc-worker" \
      org.opencontainers.image.description="A worker of arc-topk, on CUDA's runtime" \
      org.opencontainers.image.source="https://github.com/arc-topk/arc-topk" \
      org.opencontainers.image.licenses="Apache-2.0"
# The driver's libraries are put in by the container runtime.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /root-of-image/ /
USER 65532:65532
EXPOSE 9400/tcp
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/arc-worker"]
CMD ["train"]

FROM ${DEBIAN} AS cpu
LABEL org.opencontainers.image.title="arc-worker" \
      org.opencontainers.image.description="A worker of arc-topk" \
      org.opencontainers.image.source="https://github.com/arc-topk/arc-topk" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /root-of-image/ /
# k8s/compose.yaml mounts a volume here, which takes its owner.
RUN install --directory --owner=65532 --group=65532 /var/lib/arc-topk/certs
USER 65532:65532
EXPOSE 9400/tcp
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/arc-worker"]
CMD ["train"]
