"""Encryption at rest of the disk tier's values and blobs: AES-256-GCM (NIST SP 800-38D).

Each file has a key of its own, derived from the configured one (HKDF, RFC 5869), so that nonces
need to be unique in that file alone. A ciphertext is bound to its name: under another it doesn't
decrypt. Keys of entries, sizes, times and priorities aren't encrypted; keys are digests already.
"""

import os
from struct import Struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32

_NONCE_BYTES = 12
_COUNTED = Struct(">Q")
_SALT_BYTES = 16
_CHECK = b"tierserve disk tier"


class EncryptionKeyError(OSError):
    """The file needs another key, needs a key and got none, or isn't encrypted and got one."""


class Cipher:
    """Encrypts and decrypts for one file, which `begin` or `resume` chooses first.

    Args:
        key: of `KEY_BYTES` that nobody can guess.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key must have {KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    def begin(self) -> bytes:
        """Derive a new file's key. Returns what the file has to keep for `resume`."""
        salt = os.urandom(_SALT_BYTES)
        self._aead = self._derived(salt)
        return salt + self.encrypt(_CHECK, _CHECK)

    def resume(self, kept: bytes) -> None:
        """Derive the key of a file that has kept what `begin` returned.

        Raises:
            EncryptionKeyError: the file is encrypted with another key.
        """
        self._aead = self._derived(kept[:_SALT_BYTES])
        try:
            self.decrypt(_CHECK, kept[_SALT_BYTES:])
        except ValueError:
            raise EncryptionKeyError("it is encrypted with another key") from None

    def _derived(self, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, _CHECK).derive(self._key))

    def encrypt(self, name: bytes, plain: bytes, number: int | None = None) -> bytes:
        """Return nonce and ciphertext of `plain`.

        Args:
            name: what it has to be decrypted with.
            plain: any bytes.
            number: one that no other value in the file has. Without it the nonce is random alone,
                which is good for billions of values, but not for all that a file sees.
        """
        nonce = os.urandom(_NONCE_BYTES)
        if number is not None:
            nonce = _COUNTED.pack(number) + nonce[_COUNTED.size :]
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
