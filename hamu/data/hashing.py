"""Content hashes of arrays: what says that two runs have seen the same rows."""

from __future__ import annotations

import hashlib

import numpy as np


def sha256_arrays(*arrays: np.ndarray) -> str:
    """Return the SHA-256 (64 hex digits) of the arrays' types, shapes and values, in order; the same on any machine."""
    digest = hashlib.sha256()
    for array in arrays:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{little.dtype.str}{little.shape}".encode())
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
