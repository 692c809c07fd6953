"""The generated module says what fleet.proto says."""

import re
from pathlib import Path

from lepton_fl.fleet.protocol import fleet_pb2 as pb

PROTO = Path(pb.__file__).with_name("fleet.proto").read_text(encoding="utf-8")


def fields_in(text: str) -> dict[str, dict[str, int]]:
    """Message (nested ones by their own name) to the numbers of its fields."""
    found: dict[str, dict[str, int]] = {}
    stack: list[str] = []
    for line in (whole.split("//")[0].strip() for whole in text.splitlines()):
        if opened := re.fullmatch(r"(message|enum|oneof|service) (\w+) \{(\})?", line):
            kind, name, closed = opened.groups()
            stack.append(name if kind == "message" else kind)
            if kind == "message":
                found[name] = {}
            if closed:
                stack.pop()
        elif line == "}":
            stack.pop()
        elif field := re.fullmatch(r"(?:repeated )?[\w.]+ (\w+) = (\d+);", line):
            owner = next(name for name in reversed(stack) if name != "oneof")
            if owner != "enum":
                found[owner][field[1]] = int(field[2])
    return found


def fields_of(message) -> dict[str, dict[str, int]]:
    found = {message.name: {field.name: field.number for field in message.fields}}
    for nested in message.nested_types:
        found |= fields_of(nested)
    return found


def test_generated_module_is_of_this_proto():
    """Every message and field number of the .proto is in the module, and none besides."""
    generated = {}
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        generated |= fields_of(message)

    assert generated == fields_in(PROTO)
