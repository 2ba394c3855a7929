#!/usr/bin/env bash
# Runs compose on kvmesh's files with whichever compose command is installed, and sees to it that the base
# images and certificate authorities that the build needs are there.
#   deploy/docker/compose.sh up|down|build|ps|logs ... [compose options]
#   KVMESH_BASE_IMAGE, KVMESH_RUST_IMAGE   base images      KVMESH_EXTRA_CA   PEM bundle the build trusts as well
#   KVMESH_GPU=1                            adds docker-compose.gpu.yml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

command -v docker >/dev/null || die "docker is missing: install Docker Engine, or use \`make up\`, which needs no container"
docker info >/dev/null 2>&1 || die "the Docker engine does not answer: start it, and see that you may use it (\`docker info\`)"
if docker compose version >/dev/null 2>&1; then compose=(docker compose)
elif command -v docker-compose >/dev/null; then compose=(docker-compose)
else die "compose is missing: install the Docker Compose plugin"; fi
compose+=(-f docker-compose.yml)
[ "${KVMESH_GPU:-0}" = 1 ] && compose+=(-f docker-compose.gpu.yml)

reachable() { docker image inspect "$1" >/dev/null 2>&1 || timeout 300 docker pull -q "$1" >/dev/null 2>&1; }

prepare_build() {
  export KVMESH_BASE_IMAGE=${KVMESH_BASE_IMAGE:-python:3.11-slim-bookworm}
  export KVMESH_RUST_IMAGE=${KVMESH_RUST_IMAGE:-rust:1.95-slim-bookworm}
  if ! reachable "$KVMESH_BASE_IMAGE" || ! reachable "$KVMESH_RUST_IMAGE"; then
    KVMESH_BASE_IMAGE=kvmesh-base:bookworm KVMESH_RUST_IMAGE=kvmesh-base:rust
    deploy/docker/local-base.sh "$KVMESH_BASE_IMAGE" "$KVMESH_RUST_IMAGE"
  fi
  # A build behind a company's proxy needs the company's authority; compose can only copy from the checkout.
  local host_ca=(/usr/local/share/ca-certificates/*.crt)
  mkdir -p .cache
  if [ -n "${KVMESH_EXTRA_CA:-}" ]; then cat "$KVMESH_EXTRA_CA" > .cache/extra-ca.pem
  elif [ -e "${host_ca[0]}" ]; then cat "${host_ca[@]}" > .cache/extra-ca.pem
  else cat deploy/docker/no-extra-ca.pem > .cache/extra-ca.pem; fi
  export KVMESH_EXTRA_CA=.cache/extra-ca.pem
}

case "${1:-}" in
  up) prepare_build; shift; exec "${compose[@]}" up --build --detach "$@" ;;
  build) prepare_build; exec "${compose[@]}" "$@" ;;
  "") die "usage: deploy/docker/compose.sh up|down|build|ps|logs ..." ;;
  *) exec "${compose[@]}" "$@" ;;
esac
