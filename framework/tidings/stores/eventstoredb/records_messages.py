"""The messages of KurrentDB's second protocol, declared here because esdbclient has none of them. It decides nothing.

They have a pool of their own: kurrentdbclient declares the same names in protobuf's.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Final

from google.protobuf import (  # type: ignore[import-untyped]
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    struct_pb2,
)

__all__ = ["FORMATS", "MESSAGES", "PACKAGE", "STATUS_TRAILER", "status_of"]

PACKAGE: Final = "kurrentdb.protocol.v2.streams"
STATUS_TRAILER: Final = "grpc-status-details-bin"
"""Where gRPC carries a `google.rpc.Status`, in base64."""
FORMATS: Final = ("Unspecified", "Json", "Protobuf", "Avro", "Bytes")
"""What data is, by its number, as metadata say it."""

_Field = descriptor_pb2.FieldDescriptorProto
_KINDS: Final = {
    "bytes": _Field.TYPE_BYTES,
    "int32": _Field.TYPE_INT32,
    "sint64": _Field.TYPE_SINT64,
    "string": _Field.TYPE_STRING,
}
# One line for each message: its fields as "number name kind", where "*" repeats and "?" tells absent from empty.
_STREAMS: Final = {
    "SchemaInfo": "1 format SchemaFormat, 2 name string, 3 id? string",
    "PropertiesEntry": "1 key string, 2 value google.protobuf.Value",
    "AppendRecord": "1 record_id? string, 2 properties* PropertiesEntry, 3 schema SchemaInfo, "
    "4 data bytes, 5 stream? string",
    "StreamStateCheck": "1 stream string, 2 expected_state sint64",
    "ConsistencyCheck": "1 stream_state StreamStateCheck",
    "AppendRecordsRequest": "1 records* AppendRecord, 2 checks* ConsistencyCheck",
    "StreamRevision": "1 stream string, 2 revision sint64",
    "AppendRecordsResponse": "1 revisions* StreamRevision, 2 position sint64",
    "AppendRequest": "1 stream string, 2 records* AppendRecord, 3 expected_revision? sint64",
    "AppendResponse": "1 stream string, 2 stream_revision sint64, 3 position? sint64",
    "AppendSessionResponse": "1 output* AppendResponse, 2 position sint64",
    "StreamDeletedErrorDetails": "1 stream string",
    "StreamTombstonedErrorDetails": "1 stream string",
    "StreamAlreadyInAppendSessionErrorDetails": "1 stream string",
    "StreamRevisionConflictErrorDetails": "1 stream string, 2 expected_revision sint64, 3 actual_revision sint64",
    "AppendRecordSizeExceededErrorDetails": "1 stream string, 2 record_id string, 3 size int32, 4 max_size int32",
    "AppendTransactionSizeExceededErrorDetails": "1 size int32, 2 max_size int32",
    "StreamStateViolation": "1 stream string, 2 expected_state sint64, 3 actual_state sint64",
    "ConsistencyViolation": "1 check_index int32, 2 stream_state StreamStateViolation",
    "AppendConsistencyViolationErrorDetails": "1 violations* ConsistencyViolation",
}
_RPC: Final = {
    "Status": "1 code int32, 2 message string, 3 details* google.protobuf.Any",
    "ErrorInfo": "1 reason string, 2 domain string",
    "FieldViolation": "1 field string, 2 description string",
    "BadRequest": "1 field_violations* FieldViolation",
}


def _file(name: str, package: str, messages: dict[str, str], needs: str) -> Any:
    file = descriptor_pb2.FileDescriptorProto(name=name, package=package, syntax="proto3", dependency=[needs])
    for message, fields in messages.items():
        made = file.message_type.add(name=message)
        for number, field, kind in (text.split() for text in fields.split(", ")):
            label = _Field.LABEL_REPEATED if field.endswith("*") else _Field.LABEL_OPTIONAL
            added = made.field.add(name=field.rstrip("*?"), number=int(number), label=label)
            if field.endswith("?"):
                added.proto3_optional, added.oneof_index = True, len(made.oneof_decl)
                made.oneof_decl.add(name=f"_{added.name}")
            if kind in _KINDS:
                added.type = _KINDS[kind]
            else:
                added.type = _Field.TYPE_ENUM if kind == "SchemaFormat" else _Field.TYPE_MESSAGE
                added.type_name = f".{kind}" if "." in kind else f".{package}.{kind}"
    return file


def _made() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for module in (struct_pb2, any_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    file = _file("streams.proto", PACKAGE, _STREAMS, struct_pb2.DESCRIPTOR.name)
    formats = file.enum_type.add(name="SchemaFormat")
    for number, name in enumerate(FORMATS):
        formats.value.add(name=f"SCHEMA_FORMAT_{name.upper()}", number=number)
    rpc = _file("status.proto", "google.rpc", _RPC, any_pb2.DESCRIPTOR.name)
    for made in (file, rpc):
        pool.AddSerializedFile(made.SerializeToString())
    names = [f"{PACKAGE}.{name}" for name in _STREAMS] + [f"google.rpc.{name}" for name in _RPC]
    return {
        name.rpartition(".")[2]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names
    }


MESSAGES: Final = _made()
"""The classes, by their names."""


def status_of(code: int, says: str, *details: Any) -> str:
    """Return a status with its details, as the trailer carries it."""
    status = MESSAGES["Status"](code=code, message=says)
    for each in details:
        status.details.add(type_url=f"type.googleapis.com/{each.DESCRIPTOR.full_name}", value=each.SerializeToString())
    return b64encode(status.SerializeToString()).decode().rstrip("=")
