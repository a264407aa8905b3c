"""Pictures for tests, as the bytes of their files."""

import io
import struct
import zlib

from PIL import Image


def encoded(
    colour: tuple[int, int, int], form: str = "PNG", size: tuple[int, int] = (6, 4)
) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A file that claims to be an image of this size and holds no pixels."""

    def chunk(content: bytes) -> bytes:
        length, checksum = len(content) - 4, zlib.crc32(content)
        return struct.pack(">I", length) + content + struct.pack(">I", checksum)

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(head) + chunk(b"IDAT" + zlib.compress(b""))
