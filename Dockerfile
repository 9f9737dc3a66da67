# The server, the client and their core dependencies: no torch, no compiler and no pip in the image
# that runs. Build it with `docker build --tag respkv .`; `make image-test` builds and runs it, with
# buildah and podman where there is no Docker.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# pip lives in an environment of its own, so that the one that is shipped has none.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/respkv
# A private package index or CA comes in as the secrets `pip` and `ca`; no layer keeps them.
# The dependencies are a layer of their own: they change less often than the source.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    if [ -s /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi && \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi && \
    python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >core.txt && \
    /opt/pip/bin/pip --no-cache-dir --disable-pip-version-check --python /opt/respkv/bin/python \
        install --constraint constraints.txt --requirement core.txt
COPY README.md LICENSE ./
COPY respkv respkv
COPY engine engine
COPY tiers tiers
COPY kernels kernels
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    if [ -s /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi && \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi && \
    /opt/pip/bin/pip --no-cache-dir --disable-pip-version-check --python /opt/respkv/bin/python \
        install --no-deps .

FROM ${BASE}
# A fixed number, because the socket (0700) and the arena (0600) open only to the same user: workers
# that share them run as this one.
RUN groupadd --gid 10001 respkv && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /run/respkv \
        --shell /usr/sbin/nologin respkv && \
    install --directory --owner=respkv --group=respkv --mode=0700 /run/respkv /var/lib/respkv
COPY --from=build /opt/respkv /opt/respkv
# RESPKV_URL is where `respkv ping`, the health check, and the other client commands look; give
# one with a password in it when the server has one.
ENV PATH=/opt/respkv/bin:$PATH \
    RESPKV_URL=unix:///run/respkv/respkv.sock \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# The Unix socket. The arena lies in /dev/shm, which is no VOLUME on purpose: a volume there would be
# a folder on disk. Share it by sharing the IPC namespace, as compose.yaml does.
# The file tiers' place is /var/lib/respkv, which is no VOLUME either: mount a named volume or a
# directory of user 10001 there, with --nvme-path=/var/lib/respkv/nvme, or pages end with the container.
VOLUME ["/run/respkv"]
EXPOSE 7379
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["respkv", "ping", "--timeout", "2"]
ENTRYPOINT ["respkv"]
CMD ["serve", "--unixsocket", "/run/respkv/respkv.sock"]
