"""Encrypt the values of checkpoints with `LANGGRAPH_AES_KEY`.

The format is that of LangGraph's `EncryptedSerializer`, so that its tools read what Belay has
written with the same key, and Belay what LangGraph's own server has. Values that were stored before
there was a key are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from belay_server.domain.errors import StateUnreadable


@dataclass(frozen=True, slots=True)
class Hidden:
    """A primitive value that the saver must not write into the row of the checkpoint."""

    value: Any


def encrypting(serde: SerializerProtocol, key: bytes) -> EncryptedSerializer:
    """Return a serializer that encrypts what another one returns. It needs pycryptodome."""
    return EncryptedSerializer.from_pycryptodome_aes(serde, key=key)


@contextmanager
def decrypting(types: Iterable[bytes]) -> Iterator[None]:
    """Raise StateUnreadable if a value cannot be decrypted. `types` are those of the values, where
    `+` precedes the name of a cipher."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        encrypted = next((given.decode() for given in types if b"+" in given), None)
        if encrypted is None:
            raise
        raise StateUnreadable(
            f"The thread's state is encrypted ({encrypted}), and LANGGRAPH_AES_KEY is not set or "
            "is another key"
        ) from error


def with_hidden_primitives(
    checkpoint: Mapping[str, Any], new_versions: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint whose primitive values become blobs as others do, and the versions of the
    channels to store.

    A channel that has not changed is stored too, under its present version: it may have been
    written into the row of an earlier checkpoint, before there was a key.
    """
    versions, values = checkpoint["channel_versions"], checkpoint["channel_values"]
    hidden = {
        channel: Hidden(value)
        for channel, value in values.items()
        if channel in versions and (value is None or isinstance(value, (str, int, float, bool)))
    }
    to_store = {channel: versions[channel] for channel in hidden}
    return {**checkpoint, "channel_values": {**values, **hidden}}, {**to_store, **new_versions}


def shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a checkpoint, with those that are hidden as they were."""
    return {
        channel: value.value if isinstance(value, Hidden) else value
        for channel, value in values.items()
    }
