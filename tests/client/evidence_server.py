"""A TLS server that answers questions for evidence, as well or as badly as a test wants."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.tee.certificates import KeyPair
from tests.tee.statements import RECEIPT_KEY, statement
from tsqp.tee.evidence import Quote, make_evidence
from tsqp.tee.verification import spki_sha256

Answer = Callable[[str], tuple[int, bytes]]  # of a nonce, hex
More = dict[str, str]  # headers


def honest(pair: KeyPair) -> Answer:
    """Evidence of kind none for the certificate of ``pair``."""

    def answer(nonce: str) -> tuple[int, bytes]:
        given = statement(nonce=nonce, spki_sha256=spki_sha256(pair.der).hex())
        quote = Quote(kind="none", quote=b"")
        return 200, make_evidence(given, quote, RECEIPT_KEY, pair.der, int(time.time())).to_json()

    return answer


@contextmanager
def evidence_server(pair: KeyPair, answer: Answer, directory: Path, more: More | None = None) -> Iterator[str]:
    """Its address. ``directory``: for the key of its certificate. ``more``: of each answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            nonces = parse_qs(asked.query).get("nonce", [])
            status, body = answer(nonces[0]) if asked.path == "/v1/attestation" and nonces else (404, b"")
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.write(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
