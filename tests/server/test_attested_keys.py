"""The keys of a run: in memory, of one run, and what statements and TLS say of them is the same."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from tests.commands import descriptors_of
from tsqp.client.asking import unverified_tls
from tsqp.server.attested_keys import AttestedKeys
from tsqp.tee.verification import spki_sha256


def test_tls_has_the_key_that_statements_name() -> None:
    keys = AttestedKeys()
    ours, theirs = socket.socketpair()
    context = keys.tls()

    def answer() -> None:
        with context.wrap_socket(theirs, server_side=True) as connection:
            connection.sendall(connection.recv(4))

    server = threading.Thread(target=answer)
    server.start()
    with unverified_tls().wrap_socket(ours) as connection:
        certificate = connection.getpeercert(binary_form=True)
        assert connection.version() == "TLSv1.3"
        connection.sendall(b"ping")
        assert connection.recv(4) == b"ping"
    server.join()
    assert certificate == keys.certificate
    assert certificate is not None
    assert spki_sha256(certificate).hex() == keys.spki_sha256


def test_each_run_has_its_own() -> None:
    one, other = AttestedKeys(), AttestedKeys()
    assert one.spki_sha256 != other.spki_sha256
    assert one.public_receipt_key != other.public_receipt_key


def test_no_key_has_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL reads from a descriptor of this process, which has no name, is wiped and does not stay open."""
    read: list[str] = []
    load = ssl.SSLContext.load_cert_chain

    def watched(context: ssl.SSLContext, path: str) -> None:
        read.append(str(Path(path).readlink()))
        load(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    keys = AttestedKeys()
    keys.tls()
    assert read == ["/memfd:tsqp-tls (deleted)"]
    assert descriptors_of(read[0]) == []


def test_without_memory_files_the_key_is_named_for_a_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under Gramine, where that directory is memory of the enclave."""

    def missing(_name: str) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    seen: list[tuple[Path, int]] = []
    load = ssl.SSLContext.load_cert_chain

    def watched(context: ssl.SSLContext, path: str) -> None:
        seen.append((Path(path).parent, stat.S_IMODE(Path(path).stat().st_mode)))
        load(context, path)

    monkeypatch.setattr(os, "memfd_create", missing)
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    keys = AttestedKeys()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        keys.tls()  # nothing falls back to a file by itself
    keys.tls(tmp_path)
    assert seen == [(tmp_path, 0o600)]
    assert list(tmp_path.iterdir()) == []


def test_a_client_of_tls_1_2_is_refused() -> None:
    """Its certificate could be changed in mid-connection."""
    context = AttestedKeys().tls()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
