"""TLS of the listening sockets: 1.2 or newer, and the certificate read again when it changes."""

import re
import ssl
from hashlib import sha256
from pathlib import Path

from server.config.base import ConfigError
from server.config.schema import TlsConfig

_first_in = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL).search


class Certificate:
    """A certificate with its key, as connections that begin are shown it.

    Args:
        files: where they are.

    Raises:
        ConfigError: they can't be read, or don't belong together.
    """

    def __init__(self, files: TlsConfig) -> None:
        self._files = files
        self._current = self.read()
        self.context = self.read()
        """What the listening sockets are given once and for all."""
        self.context.sni_callback = self._select_context

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read again when it changes."""
        return self._files.certificate_file, self._files.key_file

    def read(self) -> ssl.SSLContext:
        """Return what the files hold now.

        Raises:
            ConfigError: they can't be read, or don't belong together.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.set_alpn_protocols(["http/1.1"])
        self._load(made)
        return made

    def use(self, read: ssl.SSLContext) -> None:
        """Show what `read` returned from now on."""
        self._current = read

    def _select_context(
        self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext
    ) -> None:
        # Called whether the client has named a host or not.
        connection.context = self._current

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key = self._files.certificate_file, self._files.key_file
        unread = []
        for name, file in (("certificate_file", certificate), ("key_file", key)):
            try:
                file.read_bytes()
            except OSError as exc:
                unread.append(f"server.tls.{name}: {file}: {exc.strerror}")
        if unread:
            raise ConfigError(unread)
        try:
            # Without a password it would ask for one at the terminal.
            context.load_cert_chain(certificate, key, password="")
        except OSError as exc:
            # Of which those of TLS are some.
            why = exc.reason if isinstance(exc, ssl.SSLError) else exc.strerror
            should = "should be a certificate and its key in PEM, the key without a password"
            raise ConfigError([f"server.tls: {should}: {why or exc}"]) from exc


def fingerprint(files: TlsConfig) -> bytes:
    """Return the SHA-256 of the certificate itself.

    Raises:
        OSError: it can't be read.
        ValueError: there is none in its file.
    """
    found = _first_in(files.certificate_file.read_text(encoding="ascii"))
    if found is None:
        raise ValueError(f"{files.certificate_file} should hold a certificate in PEM")
    return sha256(ssl.PEM_cert_to_DER_cert(found[0])).digest()
