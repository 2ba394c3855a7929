"""Whose a request is and how urgent, from the client's wish and what its key says."""

from __future__ import annotations

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tenants.contract import Caller
from kvmesh.v1.errors_pb2 import ErrorCode


def tenant_of(caller: Caller, wish: str) -> str:
    """The key's tenant; without keys, the one the client names.

    Raises KvmeshError(PERMISSION_DENIED) where the client names another than its key's.
    """
    if caller.key is None:
        return wish
    if wish and wish != caller.tenant:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_PERMISSION_DENIED,
            f"the API key belongs to tenant {caller.tenant!r}, not to {wish!r}; leave `tenant` out",
            param="kvmesh.tenant",
        )
    return caller.tenant


def priority_of(caller: Caller, wish: int) -> int:
    """The key's priority, or what the client asks for where that is less; 0 asks for nothing."""
    if caller.key is None:
        return wish
    return min(wish or caller.key.priority, caller.key.priority)
