"""What keeps blocks apart, and whose they are."""

from __future__ import annotations

import itertools

from kvmesh.common.block_names import block_salt, cache_salt_of, tenant_of_salt


def test_salts_differ_by_model_tenant_and_adapter() -> None:
    salts = [
        block_salt(cache_salt_of(*of), adapter)
        for of in itertools.product(["", "model:org/m"], ["", "a", "b"])
        for adapter in ("", "terse")
    ]
    assert salts[0] == ""
    assert len(set(salts)) == len(salts)


def test_a_salt_tells_whose_its_blocks_are() -> None:
    for model, tenant, adapter in itertools.product(
        ["", "model:org/m"], ["", "acme", "a/b", "ten:ant"], ["", "terse"]
    ):
        assert tenant_of_salt(block_salt(cache_salt_of(model, tenant), adapter)) == tenant
