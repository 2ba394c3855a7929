#!/usr/bin/env bash
# A mesh that asks for keys: make one, use it, see what it used, close it.
#   kvmesh up --detach --config examples/tenants.yaml && examples/tenants.sh
set -euo pipefail

KEY=$(kvmesh keys create --tenant acme --rpm 600 --tpm 200000 --concurrency 16)
curl -s localhost:8000/v1/chat/completions -H "authorization: Bearer $KEY" -H 'content-type: application/json' \
  -d '{"model": "default", "max_tokens": 32, "messages": [{"role": "user", "content": "What is the capital of France?"}]}' \
  -D /dev/stderr
echo
sleep 1
kvmesh usage --tenant acme --since 1h
kvmesh keys revoke "$KEY"
