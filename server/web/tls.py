"""TLS of the listening sockets: 1.2 or newer, with a certificate that is reloaded on change."""

import re
import ssl
from hashlib import sha256
from pathlib import Path

from server.config.base import ConfigError
from server.config.schema import TlsConfig

_first_in = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL).search


class Certificate:
    """The certificate and key for new connections.

    Args:
        files: their paths.

    Raises:
        ConfigError: the files can't be read, or the key is not the certificate's.
    """

    def __init__(self, files: TlsConfig) -> None:
        self._files = files
        self._current = self.read()
        self.context = self.read()
        """The context of the listening sockets; it selects the current one for each connection."""
        self.context.sni_callback = self._select_context

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are watched for changes."""
        return self._files.certificate_file, self._files.key_file

    def read(self) -> ssl.SSLContext:
        """Return a context with what the files hold now.

        Raises:
            ConfigError: the files can't be read, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        return context

    def use(self, read: ssl.SSLContext) -> None:
        """Use the context that `read` returned for new connections."""
        self._current = read

    def _select_context(
        self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext
    ) -> None:
        # Called also if the client has named no host.
        connection.context = self._current

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key = self._files.certificate_file, self._files.key_file
        mistakes = []
        for name, file in (("certificate_file", certificate), ("key_file", key)):
            try:
                file.read_bytes()
            except OSError as exc:
                mistakes.append(f"server.tls.{name}: {file}: {exc.strerror}")
        if mistakes:
            raise ConfigError(mistakes)
        try:
            # Without this OpenSSL asks for a password at the terminal.
            context.load_cert_chain(certificate, key, password="")
        except OSError as exc:
            # `ssl.SSLError` is an `OSError`.
            reason = exc.reason if isinstance(exc, ssl.SSLError) else exc.strerror
            should = "should be a certificate and its key in PEM, the key without a password"
            raise ConfigError([f"server.tls: {should}: {reason or exc}"]) from exc


def fingerprint(files: TlsConfig) -> bytes:
    """Return the SHA-256 of the certificate itself.

    Raises:
        OSError: the file can't be read.
        ValueError: the file holds no certificate.
    """
    found = _first_in(files.certificate_file.read_text(encoding="ascii"))
    if found is None:
        raise ValueError(f"{files.certificate_file} should hold a certificate in PEM")
    return sha256(ssl.PEM_cert_to_DER_cert(found[0])).digest()
