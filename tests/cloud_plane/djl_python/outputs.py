import json
import struct


class Output:
    def __init__(self, code=200, message="OK"):
        self.code, self.message, self.properties, self.content = code, message, {}, []

    def add(self, value, key=None):
        assert isinstance(value, (bytes, bytearray)), "the async engine takes encoded bytes"
        self.content.append(bytes(value))

    def add_property(self, key, value):
        self.properties[key] = value

    @staticmethod
    def binary_encode(document):
        """Pairs of length-prefixed text: a key, then its value in JSON."""
        encoded = bytearray(struct.pack(">H", len(document)))
        for key, value in document.items():
            for part in (key.encode(), json.dumps(value).encode()):
                encoded += struct.pack(">I", len(part)) + part
        return encoded

    def decoded(self):
        (content,) = self.content
        (pairs,) = struct.unpack_from(">H", content)
        place, parts = 2, []
        for _ in range(2 * pairs):
            (size,) = struct.unpack_from(">I", content, place)
            parts.append(content[place + 4 : place + 4 + size])
            place += 4 + size
        return {key.decode(): json.loads(value) for key, value in zip(parts[::2], parts[1::2], strict=True)}
