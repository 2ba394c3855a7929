#!/usr/bin/env bash
# Builds, from Debian packages and this machine's Rust toolchain, the two base images that the Dockerfile
# otherwise pulls: for machines that reach a Debian mirror but no container registry. Needs root and debootstrap.
#   deploy/docker/local-base.sh BASE_IMAGE RUST_IMAGE
set -euo pipefail
base_image=$1 rust_image=$2
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { docker image inspect "$1" >/dev/null 2>&1; }

have "$base_image" && have "$rust_image" && exit 0
[ "$(id -u)" = 0 ] || die "no registry answers for $base_image; building a base here needs root: set KVMESH_BASE_IMAGE to an image you have"
command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq debootstrap >/dev/null; } ||
  die "no registry answers for $base_image; install debootstrap to build a base here, or set KVMESH_BASE_IMAGE"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say "no registry answers: building $base_image from Debian packages (about 2 minutes)"
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/base" >"$work/log" 2>&1 ||
  { tail -5 "$work/log" >&2; die "debootstrap failed"; }
rm -rf "$work/base/var/cache/apt/archives"/*.deb
tar -C "$work/base" -c . | docker import - "$base_image" >/dev/null

say "building $rust_image from it and $(rustc --version)"
chroot "$work/base" apt-get install -y -qq gcc libc6-dev >"$work/log" 2>&1 || { tail -5 "$work/log" >&2; die "apt-get failed"; }
mkdir -p "$work/base/usr/local/rust"
cp -a "$(rustc --print sysroot)/." "$work/base/usr/local/rust/"
rm -rf "$work/base/usr/local/rust/share" "$work/base/var/cache/apt/archives"/*.deb
tar -C "$work/base" -c . | docker import --change 'ENV PATH=/usr/local/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$rust_image" >/dev/null
