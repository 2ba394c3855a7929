"""The trailing metadata of a call that failed: kvmesh's own message, and gRPC's richer error model beside it.

The latter is `google.rpc.Status` (https://google.aip.dev/193), which clients in every language have readers
for: `grpc_status.rpc_status.from_call` in Python.
"""

from __future__ import annotations

from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from kvmesh.common.errors import ERROR_METADATA_KEY, KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

STATUS_METADATA_KEY = "grpc-status-details-bin"
DOMAIN = "kvmesh"
"""of the reasons"""


def error_trailers(error: KvmeshError) -> list[tuple[str, bytes]]:
    """Keys and values for the call that ends with the error's own status."""
    return [
        (ERROR_METADATA_KEY, error.to_proto().SerializeToString()),
        (STATUS_METADATA_KEY, rich_status(error).SerializeToString()),
    ]


def rich_status(error: KvmeshError) -> Status:
    """With the code's name as the reason and, where known, the field at fault and when to try again."""
    status = Status(code=error.spec.grpc.value[0], message=error.message)
    reason = ErrorCode.Name(error.code).removeprefix("ERROR_CODE_")
    status.details.add().Pack(ErrorInfo(reason=reason, domain=DOMAIN))
    if error.param:
        # Not described once more: clients take 8 KiB of metadata in all.
        violation = BadRequest.FieldViolation(field=error.param)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if error.retry_after_ms:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(retry)
    return status
