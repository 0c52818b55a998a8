"""SentencePiece's model files as protocol buffers: the fields that are read and written here, by their published numbers.

The classes that come with the package sentencepiece were made by one version of protobuf's compiler, and refuse to be imported
beside a protobuf that is older. What stands in a file beside these fields is kept.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

# Message: {field: (number, type, default)}; a type that is a message's name is one of these, "[...]" is repeated.
FIELDS = {
    "TrainerSpec": {
        "model_type": (3, "int32", "1"), "vocab_size": (4, "int32", "8000"), "byte_fallback": (35, "bool"),
        "unk_id": (40, "int32", "0"), "bos_id": (41, "int32", "1"), "eos_id": (42, "int32", "2"), "pad_id": (43, "int32", "-1"),
    },
    "NormalizerSpec": {"name": (1, "string"), "precompiled_charsmap": (2, "bytes")},
    "SentencePiece": {"piece": (1, "string"), "score": (2, "float"), "type": (3, "int32", "1")},
    "ModelProto": {"pieces": (1, "[SentencePiece]"), "trainer_spec": (2, "TrainerSpec"), "normalizer_spec": (3, "NormalizerSpec")},
}  # fmt: skip
UNIGRAM = 1  # of `model_type`, an enumeration there; its numbers are written as those of integers are
KINDS = SimpleNamespace(NORMAL=1, UNKNOWN=2, CONTROL=3, USER_DEFINED=4, UNUSED=5, BYTE=6)  # of a piece's `type`, another


@functools.cache
def model_proto() -> Any:
    """Returns the class of a whole file."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="sentencepiece_fields.proto", package="sentencepiece", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in FIELDS.items():
        made = file.message_type.add(name=message)
        for name, (number, kind, *default) in fields.items():
            single = kind.strip("[]")
            label = kinds.LABEL_REPEATED if single != kind else kinds.LABEL_OPTIONAL
            field = made.field.add(name=name, number=number, label=label, default_value=next(iter(default), None))
            if single in FIELDS:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".sentencepiece.{single}"
            else:
                field.type = getattr(kinds, f"TYPE_{single.upper()}")
    pool = descriptor_pool.DescriptorPool()  # of its own, so that sentencepiece's classes may be there, too
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sentencepiece.ModelProto"))
