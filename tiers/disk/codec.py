"""Coding of the disk tier's values: compression by zstd, then encryption.

Answers are short JSON texts that share their skeleton, so a dictionary, trained on the first of
them, is worth more than the level: it saves two thirds of the bytes and is quicker than zstd
without it. Compression costs a hit about a tenth (scripts/bench/hits.py), so it is a choice; a
codec that doesn't compress still reads what is compressed. Encryption covers the blobs too. Only
the writer's thread encodes; `decode` may be called by one thread at a time. zstd is RFC 8878.
"""

from zstandard import (
    ZstdCompressionDict,
    ZstdCompressor,
    ZstdDecompressor,
    ZstdError,
    train_dictionary,
)

from tiers.encryption import Cipher

PLAIN, ZSTD, ZSTD_DICTIONARY = range(3)
ENCRYPTED = 16
"""Added to the coding of what is encrypted."""

_LEVEL = 1
_DICTIONARY_BYTES = 16 * 1024
_SAMPLES = 400
_SAMPLE_BYTES = 8 * 1024
_SMALLEST_BYTES = 64
_ENTRY, _BLOB = b"entry:", b"blob:"


class Codec:
    """Codes values; without a dictionary until it has been given one.

    Args:
        compresses: whether values are stored compressed; else it only reads such.
        cipher: encrypts values and blobs, if they are encrypted.
    """

    def __init__(self, *, compresses: bool, cipher: Cipher | None = None) -> None:
        self._cipher = cipher
        self.has_dictionary = False
        self._compresses = compresses
        self._samples: list[bytes | bytearray | memoryview] | None = [] if compresses else None
        self._compressor = ZstdCompressor(level=_LEVEL)
        self._decompressors = {ZSTD: ZstdDecompressor()}

    def use_dictionary(self, dictionary: bytes) -> None:
        """Code with `dictionary` from now on."""
        trained = ZstdCompressionDict(dictionary)
        trained.precompute_compress(_LEVEL)
        self._decompressors[ZSTD_DICTIONARY] = ZstdDecompressor(dict_data=trained)
        self._compressor = ZstdCompressor(level=_LEVEL, dict_data=trained)
        self._samples = None
        self.has_dictionary = True

    def sample(self, value: bytes) -> bytes | None:
        """Take `value` as a sample; return a dictionary, once, when there are enough."""
        if self._samples is None or len(value) < _SMALLEST_BYTES:
            return None
        self._samples.append(value[:_SAMPLE_BYTES])
        if len(self._samples) < _SAMPLES:
            return None
        samples, self._samples = self._samples, None
        try:
            return train_dictionary(_DICTIONARY_BYTES, samples, level=_LEVEL).as_bytes()
        except ZstdError:  # The samples have nothing in common.
            return None

    def encode(self, key: bytes, value: bytes, sequence: int) -> tuple[int, bytes]:
        """Return the coding and the payload of an entry.

        Unless it is encrypted, the payload is never longer than `value`.
        """
        coding, payload = self._compressed(value)
        if self._cipher is None:
            return coding, payload
        return coding + ENCRYPTED, self._cipher.encrypt(_ENTRY + key, payload, sequence)

    def encode_blob(self, name: bytes, blob: bytes) -> bytes:
        """Return a blob as it is stored."""
        return blob if self._cipher is None else self._cipher.encrypt(_BLOB + name, blob)

    def decode_blob(self, name: bytes, data: bytes) -> bytes:
        """Return a blob.

        Raises:
            ValueError: `encode_blob` didn't make it.
        """
        return data if self._cipher is None else self._cipher.decrypt(_BLOB + name, data)

    def _compressed(self, value: bytes) -> tuple[int, bytes]:
        if self._compresses and len(value) >= _SMALLEST_BYTES:
            payload = self._compressor.compress(value)
            if len(payload) < len(value):
                return ZSTD_DICTIONARY if self.has_dictionary else ZSTD, payload
        return PLAIN, value

    def decode(self, key: bytes, coding: int, payload: bytes | memoryview) -> bytes:
        """Return an entry's value.

        Raises:
            ValueError: the coding or its dictionary isn't known, or `encode` didn't make it.
        """
        if self._cipher is not None:
            # A value that isn't encrypted was written by a process without the key.
            coding, payload = coding - ENCRYPTED, self._cipher.decrypt(_ENTRY + key, payload)
        if coding == PLAIN:
            return bytes(payload)
        try:
            return self._decompressors[coding].decompress(payload)
        except KeyError:
            raise ValueError(f"coding {coding} can't be read") from None
        except ZstdError as exc:
            raise ValueError("payload can't be decompressed") from exc
