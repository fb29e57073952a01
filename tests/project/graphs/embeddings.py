"""Embeddings by word counts: near for texts that share words, and the same on every machine."""

from __future__ import annotations

import re
import sys
import zlib

DIMENSIONS = 64


async def embed(texts: list[str]) -> list[list[float]]:
    for text in texts:
        if "raise in the embedding" in text:
            raise RuntimeError("the provider said s3cr3t")
        if "exit in the embedding" in text:
            sys.exit("s3cr3t")
        if "none in the embedding" in text:
            return []
    return [_counts(text) for text in texts]


def _counts(text: str) -> list[float]:
    counts = [0.0] * DIMENSIONS
    for word in re.findall(r"\w+", text.lower()):
        counts[zlib.crc32(word.encode()) % DIMENSIONS] += 1.0
    return counts if any(counts) else [1.0] * DIMENSIONS
