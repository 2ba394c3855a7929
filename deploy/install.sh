#!/usr/bin/env bash
# Installs kvmesh and everything it needs into .venv, from the lock file. Idempotent; quick when nothing changed.
#   deploy/install.sh [uv sync options]        KVMESH_CUDA=0|1 overrides the look for a CUDA device
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv_version=0.13.9
uv=.cache/uv-$uv_version/bin/uv
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

if ! [ -x "$uv" ]; then
  if command -v uv >/dev/null && [ "$(uv --version | cut -d' ' -f2)" = "$uv_version" ]; then
    uv=uv
  else
    command -v python3 >/dev/null || die "python3 is missing: install Python 3.11 or later"
    python3 -m pip --version >/dev/null 2>&1 || die "pip is missing: install it (Debian: apt-get install python3-pip)"
    say "installing uv $uv_version"
    python3 -m pip install -q --disable-pip-version-check --target ".cache/uv-$uv_version" "uv==$uv_version"
  fi
fi
case " $* " in *" --frozen "*) lock=() ;; *) lock=(--locked) ;; esac  # an image build has no workspace to check
[ ${#lock[@]} = 0 ] || command -v cargo >/dev/null || die "cargo is missing: install Rust 1.85 or later (https://rustup.rs)"

# SGLang lists these, but its CPU path never imports them (over 3 GB).
cuda_only=(
  cuda-bindings cuda-core cuda-python cuda-tile flash-attn-4 flashinfer-python humming-kernels kernels kernels-data
  nccl4py nccl-extensions nvidia-cudnn-frontend nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base
  nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu12 nvidia-cutlass-dsl-libs-cu13 nvidia-mathdx
  nvshmem4py-cu13 quack-kernels sgl-deep-ep sgl-deep-gemm sgl-flash-mla sglang-kernel tilelang
  # Not CUDA, but not needed to serve text either.
  blobfile datasets modelscope modelscope-hub timm torchcodec pandas pyarrow z3-solver
)
skip=()
has_cuda() { [ "${KVMESH_CUDA:-}" != 0 ] && { [ "${KVMESH_CUDA:-}" = 1 ] || [ -e /dev/nvidiactl ]; }; }
if ! has_cuda; then for package in "${cuda_only[@]}"; do skip+=(--no-install-package "$package"); done; fi

[ -d .venv ] || say "installing Python packages into .venv (about 10 GB; several minutes with an empty cache)"
exec "$uv" sync "${lock[@]}" "${skip[@]}" "$@"
