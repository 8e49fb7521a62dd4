"""Encryption at rest: AES-256-GCM (NIST SP 800-38D). And a checksum that is as fast: its GMAC.

Each file has a key of its own, derived from the configured one (HKDF, RFC 5869), so that nonces
need to be unique in that file alone. A ciphertext is bound to its name: under another it doesn't
decrypt. Keys of entries, sizes, times and priorities aren't encrypted; keys are digests already.
"""

import os
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32

TAG_BYTES = 16

_NONCE_BYTES = 12
_COUNTED = Struct(">Q")
_SALT_BYTES = 16
_DISK_TIER = b"tierserve disk tier"
_SMALL, _LARGE = b"\0", b"\1\0\0\0"
"""What follows the number in a nonce: so a large value's number may be that of another value."""
_PUBLIC = AESGCM(bytes(KEY_BYTES))

Buffer = Any
"""An object with the buffer protocol; one that is written to must be writable."""


class EncryptionKeyError(OSError):
    """The file needs another key, needs a key and got none, or isn't encrypted and got one."""


class Fingerprint:
    """A keyed digest of 16 bytes, for tables in memory: GMAC, at 20 GB/s.

    The key is of this object alone, and digests must never be shown: then nobody can find two texts
    with the same digest, which others would have with a probability of 2^-100.
    """

    def __init__(self) -> None:
        self.of: Callable[[bytes], bytes] = partial(
            AESGCM(os.urandom(16)).encrypt, bytes(_NONCE_BYTES), b""
        )
        """Returns the digest of bytes. Every hit pays for the call, so it is no method."""


class Cipher:
    """Encrypts and decrypts for one file, which `begin` or `resume` chooses first.

    Args:
        key: of `KEY_BYTES` that nobody can guess.
        purpose: what the file is for; another purpose derives another key.
    """

    def __init__(self, key: bytes, purpose: bytes = _DISK_TIER) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key must have {KEY_BYTES} bytes, not {len(key)}")
        self._key, self._purpose = key, purpose

    def begin(self) -> bytes:
        """Derive a new file's key. Returns what the file has to keep for `resume`."""
        salt = os.urandom(_SALT_BYTES)
        self._aead = self._derived(salt)
        return salt + self.encrypt(self._purpose, self._purpose)

    def resume(self, kept: bytes) -> None:
        """Derive the key of a file that has kept what `begin` returned.

        Raises:
            EncryptionKeyError: the file is encrypted with another key.
        """
        self._aead = self._derived(kept[:_SALT_BYTES])
        try:
            self.decrypt(self._purpose, kept[_SALT_BYTES:])
        except ValueError:
            raise EncryptionKeyError("it is encrypted with another key") from None

    def _derived(self, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, self._purpose).derive(self._key))

    def encrypt(self, name: bytes, plain: bytes, number: int | None = None) -> bytes:
        """Return nonce and ciphertext of `plain`.

        Args:
            name: what it has to be decrypted with.
            plain: any bytes.
            number: one that no other value in the file has. Without it the nonce is random alone,
                which is good for billions of values, but not for all that a file sees.
        """
        begin = b"" if number is None else _COUNTED.pack(number) + _SMALL
        nonce = begin + os.urandom(_NONCE_BYTES - len(begin))
        return nonce + self._aead.encrypt(nonce, plain, name)

    def decrypt(self, name: bytes, data: bytes | memoryview) -> bytes:
        """Return what was encrypted.

        Raises:
            ValueError: `data` isn't what `encrypt` returned for that name.
        """
        try:
            return self._aead.decrypt(bytes(data[:_NONCE_BYTES]), data[_NONCE_BYTES:], name)
        except (InvalidTag, ValueError) as exc:
            raise ValueError("it is not what was encrypted") from exc

    def encrypt_large(self, number: int, plain: Buffer, out: Buffer) -> None:
        """Write the ciphertext of `plain`, then its tag of `TAG_BYTES`, to `out`, without copies.

        `number` is one that no other large value in the file has.
        """
        self._aead.encrypt_into(_COUNTED.pack(number) + _LARGE, plain, None, out)

    def decrypt_large(self, number: int, data: Buffer, out: Buffer) -> None:
        """Write what was encrypted to `out`.

        Raises:
            ValueError: `data` isn't what `encrypt_large` wrote for that number.
        """
        try:
            self._aead.decrypt_into(_COUNTED.pack(number) + _LARGE, data, None, out)
        except InvalidTag as exc:
            raise ValueError("it is not what was encrypted") from exc


def checksum(number: int, data: Buffer) -> bytes:
    """Return a checksum of `data` under `number`, of `TAG_BYTES`.

    It is GCM's authentication without encryption, under a key that everybody knows. So it detects
    damage, not intent. With the instructions that processors have for it, it takes 50 µs for a
    megabyte, a fifth of what CRC-32 takes.
    """
    return _PUBLIC.encrypt(_COUNTED.pack(number) + _LARGE, b"", data)


def check(number: int, data: Buffer, expected: bytes) -> None:
    """Check data against its checksum.

    Raises:
        ValueError: they don't belong together.
    """
    try:
        _PUBLIC.decrypt(_COUNTED.pack(number) + _LARGE, expected, data)
    except InvalidTag as exc:
        raise ValueError("the checksum is wrong") from exc
