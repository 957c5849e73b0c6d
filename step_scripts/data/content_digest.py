"""A digest of a file's content that tasks compute together, whatever the pieces in which they read it."""

from __future__ import annotations

import hashlib

BLOCK = 1 << 16  # bytes; a piece is read to its end and so much further, which is all that its last block may need


def block_sum(data: bytes, offset: int, start: int, end: int) -> int:
    """The sum of the hashes of those blocks of a file that begin at or after byte `start` and before `end`.

    `data` is what stands at `offset` in the file, up to the end of the last of these blocks or of the file.
    """
    total, content = 0, memoryview(data)
    for begin in range(-(-start // BLOCK) * BLOCK, end, BLOCK):
        block = content[begin - offset : begin - offset + BLOCK]
        total += int.from_bytes(hashlib.sha256(begin.to_bytes(8, "big") + block).digest(), "big")
    return total % (1 << 256)


def content_digest(size: int, sums: list[int]) -> str:
    """SHA-256, in hexadecimal, over a file's size in bytes and the hashes of all its blocks."""
    return hashlib.sha256(f"{size}\0{sum(sums) % (1 << 256)}".encode()).hexdigest()
