# shellcheck shell=bash disable=SC2034
# Sourced by image-test.sh: the same few words for Docker and for podman with buildah.
# Sourced from the project's root. Defines ENGINE, run_options, engine, prepare_base, build_image, healthy.

BASE=$(sed -n 's/^ARG BASE=//p' Dockerfile)
# Images and containers of the test live in a store of their own, so that the stand-in base image is
# never taken for the real one by anything else on this machine.
STORE=$PWD/build/image-store
run_options=()

if docker info >/dev/null 2>&1; then
    ENGINE=docker
else
    ENGINE=podman
    if [ "$(id -u)" -ne 0 ]; then
        echo "image-test: no Docker engine answers, and podman needs root here: run it as root" >&2
        exit 1
    fi
    .ci/debian buildah podman mmdebstrap crun
    # crun refuses a version 2 hierarchy mounted beside version 1. Out of sight, in a mount namespace
    # of this script's own, it does no harm.
    if [ -d /sys/fs/cgroup/unified ] && [ -z "${RESPKV_OWN_MOUNTS-}" ]; then
        RESPKV_OWN_MOUNTS=1 exec unshare --mount -- deploy/image-test.sh
    fi
    ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
    # podman asks for limits above those of a machine that may not raise its own.
    run_options=(--pull never
        --ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" --ulimit nproc=4096:4096)
fi

engine() {
    case $ENGINE in
    docker) docker "$@" ;;
    podman)
        # Without systemd podman logs, at every turn, that it cannot start a timer for health checks.
        podman --log-level fatal --cgroup-manager cgroupfs \
            --root "$STORE/root" --runroot "$STORE/run" "$@"
        ;;
    esac
}

# The official Python image, as far as this Dockerfile can tell: Debian, python3 in /usr/local/bin.
prepare_base() {
    [ "$ENGINE" = podman ] || return 0
    mkdir -p "$STORE"
    ! engine image exists "$BASE" || return 0
    printf '\n==> base image: a stand-in for %s\n' "$BASE"
    mkdir "$SCRATCH/base"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
        "${BASE_SUITE:-bookworm}" "$SCRATCH/base/base.tar"
    printf '%s\n' 'FROM scratch' 'ADD base.tar /' \
        'RUN ln -s /usr/bin/python3 /usr/local/bin/python3 && ln -s python3 /usr/local/bin/python' \
        'CMD ["python3"]' >"$SCRATCH/base/Dockerfile"
    buildah --root "$STORE/root" --runroot "$STORE/run" bud --quiet --isolation chroot \
        --format docker --pull-never --tag "$BASE" "$SCRATCH/base" >/dev/null
    rm -r "$SCRATCH/base"
}

# How this machine reaches its package index goes into the build as two secrets: a pip configuration
# and a CA bundle. Files in place of an index (file://) do not exist inside, so they are left out.
write_secrets() {
    local key value name
    echo '[global]' >"$SCRATCH/pip"
    for key in index-url extra-index-url trusted-host proxy; do
        name=PIP_$(tr a-z- A-Z_ <<<"$key")
        value=${!name-$(python3 -m pip config get "global.$key" 2>/dev/null || true)}
        value=$(tr ' ' '\n' <<<"$value" | sed '/^file:/d' | paste -s -d ' ' -)
        [ -z "$value" ] || printf '%s = %s\n' "$key" "$value" >>"$SCRATCH/pip"
    done
    cat "${PIP_CERT:-${SSL_CERT_FILE:-/dev/null}}" >"$SCRATCH/ca"
    chmod 600 "$SCRATCH/pip" "$SCRATCH/ca"
}

build_image() {
    local tag=$1 secrets
    write_secrets
    secrets=(--secret "id=pip,src=$SCRATCH/pip" --secret "id=ca,src=$SCRATCH/ca")
    case $ENGINE in
    docker) DOCKER_BUILDKIT=1 docker build "${secrets[@]}" --tag "$tag" . ;;
    podman)
        buildah --root "$STORE/root" --runroot "$STORE/run" bud --isolation chroot \
            --format docker --pull-never --layers "${secrets[@]}" --tag "$tag" .
        ;;
    esac
}

# podman runs the image's health check only when asked, unless systemd's timers are there to do it.
healthy() {
    case $ENGINE in
    docker) [ "$(docker inspect --format '{{.State.Health.Status}}' "$1")" = healthy ] ;;
    podman) engine healthcheck run "$1" >/dev/null 2>&1 ;;
    esac
}
