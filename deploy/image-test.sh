#!/usr/bin/env bash
# Build the image and run it as a sidecar runs: read-only, without root, capabilities or network.
# Uses Docker where its engine answers; otherwise buildah and podman, as root, with a base image made
# here from Debian's own packages, so that no image registry is needed. Not part of the gate.
#
#   BASE_SUITE  the Debian release of the stand-in base image (default bookworm, which has 3.11)
#   KEEP=1      leave the images and the container for a look
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/engine.sh
. deploy/engine.sh

NAME=respkv-image-test-$$
IMAGE=localhost/respkv:image-test
GRACE_S=30

step() {
    printf '\n==> %s\n' "$*"
}

fail() {
    printf 'image-test: %s\n' "$*" >&2
    exit 1
}

leave() {
    local status=$?
    if [ "$status" -ne 0 ]; then
        engine logs "$NAME" 2>&1 | tail -n 40 || true
    fi
    if [ -z "${KEEP-}" ]; then
        engine rm --force "$NAME-reader" >/dev/null 2>&1 || true
        engine rm --force "$NAME" >/dev/null 2>&1 || true
        engine volume rm --force "$NAME" "$NAME-tier" >/dev/null 2>&1 || true
    fi
    rm -rf "$SCRATCH"
    exit "$status"
}

# What every container of the test has: nothing that the sidecar pattern does not ask for.
confined=(--read-only --cap-drop ALL --security-opt no-new-privileges --network none)

run_server() {
    engine run --detach --name "$NAME" "${confined[@]}" "${run_options[@]}" --ipc shareable \
        --shm-size 400m --volume "$NAME:/run/respkv" --volume "$NAME-tier:/var/lib/respkv" \
        "$IMAGE" serve --unixsocket=/run/respkv/respkv.sock --maxmemory=256mb --shm=rw \
        --nvme-path=/var/lib/respkv/nvme --nvme-bytes=1gb >/dev/null
    wait_healthy
}

wait_healthy() {
    local deadline=$((SECONDS + 60))
    until healthy "$NAME"; do
        [ "$(engine inspect --format '{{.State.Running}}' "$NAME")" = true ] ||
            fail "the server ended before it was healthy"
        [ "$SECONDS" -lt "$deadline" ] || fail "not healthy after 60 s"
        sleep 0.5
    done
}

inside() {
    engine exec "$NAME" "$@"
}

# Run a script of deploy/ in a container of its own: beside SCRIPT OPTION... -- ARGUMENT...
beside() {
    local script=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    engine run "${options[@]}" "${confined[@]}" "${run_options[@]}" \
        --volume "$NAME:/run/respkv" --volume "$PWD/deploy/$script:/$script:ro" \
        --entrypoint python "$IMAGE" "/$script" "$@"
}

wait_for_line() {
    local deadline=$((SECONDS + 60))
    until engine logs "$2" 2>&1 | grep -qx "$1"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "$2 did not print '$1' within 60 s"
        sleep 0.2
    done
}

SCRATCH=$(mktemp -d)
trap leave EXIT

step "engine: $ENGINE"
prepare_base
step "build"
build_image "$IMAGE"
engine image inspect --format '{{.Size}}' "$IMAGE" |
    awk '{printf "%s MB with its base\n", int($1 / 1000000)}'

step "run: read-only, no capabilities, no network, user 10001, default seccomp and memlock"
engine volume create "$NAME" >/dev/null
engine volume create "$NAME-tier" >/dev/null
run_server
echo "healthy"

step "confinement, seen from inside"
inside sh -c 'id -u; grep -E "^(Seccomp|CapEff|NoNewPrivs):" /proc/1/status; ulimit -l' |
    tee "$SCRATCH/inside.txt"
[ "$(head -n 1 "$SCRATCH/inside.txt")" = 10001 ] || fail "does not run as user 10001"
grep -q '^CapEff:.*0000000000000000$' "$SCRATCH/inside.txt" || fail "has capabilities"
if inside sh -c 'touch /opt/respkv/here 2>/dev/null || touch /here 2>/dev/null'; then
    fail "the root file system can be written"
fi
if inside python -c 'import torch' 2>/dev/null; then fail "torch is in the image"; fi
if inside python -c 'import pip' 2>/dev/null; then fail "pip is in the image"; fi

step "PING through the socket"
inside respkv ping

step "the files of the nvme tier, and what reads and writes them under this seccomp profile"
inside ls -l /var/lib/respkv/nvme
inside respkv info | tr -d '\r' | grep -E '^kv_nvme_' | tee "$SCRATCH/tier.txt"
grep -q '^kv_nvme_state:ok$' "$SCRATCH/tier.txt" || fail "the nvme tier is not ok"

step "a worker in its own container: the same volume, the same /dev/shm"
beside worker.py --rm --ipc "container:$NAME" -- unix:///run/respkv/respkv.sock store

step "SIGTERM drains: a reply half read arrives whole, and the exit status is 0"
beside slow_reader.py --detach --name "$NAME-reader" -- /run/respkv/respkv.sock >/dev/null
wait_for_line reading "$NAME-reader"
began=$SECONDS
engine stop --time "$GRACE_S" "$NAME" >/dev/null
took=$((SECONDS - began))
read_status=$(engine wait "$NAME-reader")
engine logs "$NAME-reader"
[ "$read_status" = 0 ] || fail "the reader was cut off"
engine logs "$NAME" 2>&1 | tail -n 5
status=$(engine inspect --format '{{.State.ExitCode}}' "$NAME")
[ "$status" = 0 ] || fail "exit status $status after SIGTERM"
[ "$took" -lt "$GRACE_S" ] || fail "took the whole grace time: it was killed"
echo "the server ended by itself after $took s"

step "another container on the same volume finds what the first one held in memory"
engine rm "$NAME" >/dev/null
run_server
beside worker.py --rm --ipc "container:$NAME" -- unix:///run/respkv/respkv.sock find

step "the image builds and serves"
