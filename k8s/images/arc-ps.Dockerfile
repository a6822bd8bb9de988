# arc-ps: one static binary and nothing else, a few megabytes. Build it in the repository's root:
#
#   docker build -f k8s/images/arc-ps.Dockerfile -t arc-topk/arc-ps:0.1.0 .
#
# Without a base image at hand, build the binary outside (README.md beside this file) and take the stage `prebuilt`, which needs none:
#
#   buildah build -f k8s/images/arc-ps.Dockerfile --target prebuilt -t arc-topk/arc-ps:0.1.0 .
# What a binary that was built outside stands on: nothing, if it is static.
ARG BASE=scratch
ARG RUST=docker.io/library/rust:1.95.0-bookworm

FROM ${RUST} AS build
WORKDIR /src
COPY . .
# Static; --target keeps the flag from the build scripts, which cannot be. The same bytes wherever it is built: no paths, no symbols.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    host="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols --remap-path-prefix=/src=. --remap-path-prefix=/usr/local/cargo=cargo' \
       cargo build --release --locked --target "$host" -p arc-topk-ps --bin arc-ps \
    && mkdir -p /root-of-image/var/lib/arc-topk \
    && cp "target/$host/release/arc-ps" /root-of-image/arc-ps \
    && python3 k8s/images/sbom.py arc-topk-ps > /root-of-image/sbom.cdx.json

FROM ${BASE} AS prebuilt
COPY --chmod=0555 target/image/arc-ps /arc-ps
COPY --chmod=0444 target/image/arc-ps.cdx.json /sbom.cdx.json
USER 65532:65532
EXPOSE 7400/udp 9400/tcp
ENTRYPOINT ["/arc-ps"]

FROM scratch
LABEL org.opencontainers.image.title="arc-ps" \
      org.opencontainers.image.description="A shard of arc-topk's parameter server" \
      org.opencontainers.image.source="https://github.com/arc-topk/arc-topk" \
      org.opencontainers.image.licenses="Apache-2.0"
# /var/lib/arc-topk is for snapshots; a volume mounted there takes its owner.
COPY --from=build --chown=65532:65532 /root-of-image/ /
USER 65532:65532
EXPOSE 7400/udp 9400/tcp
STOPSIGNAL SIGTERM
ENTRYPOINT ["/arc-ps"]
