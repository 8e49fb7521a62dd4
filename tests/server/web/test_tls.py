"""TLS of the front and the admin port: real certificates over real sockets."""

import asyncio
import os
import re
import shutil
import signal
import ssl
import warnings
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import orjson
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.cli import main
from server.config.secrets import hash_key, new_key
from tests.server.conftest import CHAT, Front, Upstream, alike, question
from tests.servers import free_port
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN_KEY = new_key()
TLS = {"certificate_file": "certificate.pem", "key_file": "key.pem"}


def certificate(folder: Path, name: str, password: bytes | None = None) -> bytes:
    """Write a certificate of its own and its key; returns it in DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    locked = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password)
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, locked))
    (folder / "certificate.pem").write_bytes(made.public_bytes(pem))
    return made.public_bytes(serialization.Encoding.DER)


class TlsFront(Front):
    """A front that is asked over TLS, whatever it shows."""

    async def start(self) -> None:
        self.url = self.url.replace("http:", "https:")
        await super().start()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secure(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[TlsFront]:
    folder = tmp_path_factory.mktemp("tls")
    shown = certificate(folder, "first")
    port = free_port()
    sections = {
        "server": {"tls": TLS},
        "admin": {"port": port, "key": ADMIN_KEY},
    }
    made = TlsFront(folder, alike(_upstream.url), sections=sections)
    made.admin, made.shown, made.folder = f"https://127.0.0.1:{port}", shown, folder
    async with made:
        yield made


async def certificate_shown(front: Front) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", front.port, ssl=context)
    try:
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_knows_the_certificate_is_answered(secure: TlsFront, upstream) -> None:
    context = ssl.create_default_context(cafile=str(secure.folder / "certificate.pem"))
    async with aiohttp.ClientSession() as session:
        for status in ("fwd=miss", "; hit"):
            asked = {"messages": [{"role": "user", "content": "tls"}], "temperature": 0}
            url = f"https://localhost:{secure.port}{CHAT}"
            async with session.post(url, json=asked, ssl=context) as reply:
                assert reply.status == 200
                assert status in reply.headers["Cache-Status"]
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(f"https://localhost:{secure.port}/health")
    assert f"listening on {secure.url}" in secure.log.read_text()


async def test_nothing_is_answered_in_the_clear(secure: TlsFront, upstream) -> None:
    async with aiohttp.ClientSession() as session:
        for url in (secure.url, secure.admin):
            with pytest.raises(aiohttp.ClientError):
                await session.post(url.replace("https", "http") + CHAT, json=question())
    assert upstream.asked == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
async def test_old_versions_of_tls_are_refused(secure: TlsFront, version) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    connecting = asyncio.open_connection("127.0.0.1", secure.port, ssl=context)
    if version is ssl.TLSVersion.TLSv1_2:
        _, writer = await connecting
        writer.close()
        await writer.wait_closed()
        return
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await connecting


async def test_a_handshake_that_does_not_begin_is_ended(upstream, tmp_path: Path) -> None:
    certificate(tmp_path, "first")
    sections = {"server": {"tls": TLS, "client_timeout_s": 1}}
    async with TlsFront(tmp_path, alike(upstream.url), sections=sections) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        assert await asyncio.wait_for(reader.read(), HANGS_S) == b""
        writer.close()


async def test_the_admin_port_has_the_same_certificate(secure: TlsFront) -> None:
    given = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with aiohttp.ClientSession(secure.admin, headers=given) as session:
        async with session.get("/stats", ssl=aiohttp.Fingerprint(sha256(secure.shown))) as reply:
            assert reply.status == 200
        async with session.get("/stats", ssl=False, headers={"Authorization": ""}) as reply:
            assert reply.status == 401


def sha256(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()


async def test_warming_trusts_the_configured_certificate_alone(
    secure: TlsFront, upstream, capsys
) -> None:
    file = secure.folder / "requests.jsonl"
    file.write_bytes(orjson.dumps(question()))
    command = ["cache", "warm", "--config", str(secure.config), str(file)]
    assert await asyncio.to_thread(main, command) == 0
    assert len(upstream.asked) == 1


async def test_a_renewed_certificate_is_shown_without_a_restart(secure: TlsFront) -> None:
    assert await certificate_shown(secure) == secure.shown
    async with secure.session.get("/health", ssl=False) as begun:
        assert begun.status == 200
    renewed = certificate(secure.folder, "second")
    await until_shown(secure, renewed)
    # One that doesn't fit its key isn't. The one before may have been read half written.
    times = secure.log.read_text().count(mistake := "server.tls: should be a certificate")
    (other := secure.folder / "other").mkdir()
    certificate(other, "third")
    (other / "certificate.pem").replace(secure.folder / "certificate.pem")
    await secure.until_logged(mistake, times + 1)
    assert await certificate_shown(secure) == renewed
    secure.shown = certificate(secure.folder, "fourth")
    secure.process.send_signal(1)
    await until_shown(secure, secure.shown)


def mount(folder: Path, number: int) -> tuple[dict[str, str], bytes]:
    """Lay files out as Kubernetes does, in place of those of before: each name leads to `..data`.

    Returns a tenant's key, and the certificate.
    """
    made = folder / f"..{number}"
    made.mkdir()
    (made / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    key, shown = new_key(), certificate(made, f"number {number}")
    (made / "tenants.yaml").write_text(f"acme: {{keys: ['{hash_key(key)}']}}")
    (folder / "..next").symlink_to(made.name)
    (folder / "..next").replace(folder / "..data")
    for file in made.iterdir():
        if not (link := folder / file.name).is_symlink():
            link.unlink(missing_ok=True)
            link.symlink_to(f"..data/{file.name}")
    if number:
        shutil.rmtree(folder / f"..{number - 1}")
    return {"Authorization": f"Bearer {key}"}, shown


async def test_files_behind_links_are_found_where_these_lead_now(upstream, tmp_path: Path) -> None:
    sections = {"server": {"tls": TLS}, "tenants": {"file": "tenants.yaml"}}
    front = TlsFront(tmp_path, alike(upstream.url), sections=sections)
    old, shown = mount(tmp_path, 0)
    front.config = Path(os.path.relpath(front.config))
    async with front:
        assert await certificate_shown(front) == shown
        for number in (1, 2):
            new, shown = mount(tmp_path, number)
            if number == 2:
                front.process.send_signal(signal.SIGHUP)
            await until_shown(front, shown)
            await front.until_status(old, 401)
            await front.until_status(new, 200)
            old = new


async def until_shown(front: Front, expected: bytes) -> None:
    async with asyncio.timeout(HANGS_S):
        while True:
            if await certificate_shown(front) == expected:
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("spoilt", "mistake"),
    [
        (lambda f: (f / "key.pem").unlink(), "server.tls.key_file: .*No such file"),
        (lambda f: (f / "certificate.pem").unlink(), "server.tls.certificate_file: .*No such"),
        (lambda f: (f / "key.pem").write_text("x"), "server.tls: should be a certificate and"),
        (lambda f: certificate(f, "locked", b"word"), "the key without a password"),
    ],
)
async def test_check_reads_the_certificate(tmp_path: Path, capsys, spoilt, mistake: str) -> None:
    certificate(tmp_path, "first")
    config = tmp_path / "c.yaml"
    config.write_text("server: {tls: {certificate_file: certificate.pem, key_file: key.pem}}")
    assert main(["check", "--config", str(config)]) == 0
    assert f"key_file: {tmp_path}/key.pem" in capsys.readouterr().out
    spoilt(tmp_path)
    assert main(["check", "--config", str(config)]) == 2
    assert re.search(mistake, capsys.readouterr().err)
