"""The server of ``bench rpc`` over device memory, by fakes of both drivers."""

from __future__ import annotations

import os
import threading
from contextlib import closing

from tests.untrusted.fake_driver import FakeDriver
from tests.wire.fake_cuda import FakeIpc
from tests.wire.links import WAIT_S
from tsqp.bench import echo
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.wire.channel import Frames
from tsqp.wire.transport import connect, listen, new_cuda_address


def test_the_device_inverts_in_the_arena_and_nothing_is_copied_beside_it() -> None:
    ipc, client = FakeIpc(), FakeIpc()
    driver = FakeDriver(ipc=ipc)
    with closing(listen(new_cuda_address(), driver=ipc)) as listener:
        thread = threading.Thread(target=echo.serve, args=(listener, None, CudaBackend(driver)))
        thread.start()
        with closing(connect(listener.address, driver=client, arena_bytes=1 << 21)) as channel:
            for size in (8, 80_000):
                source = os.urandom(size)
                channel.send(Frames(b"call", (memoryview(source),)), size)
                (reply,) = channel.receive(WAIT_S).tensors
                assert bytes(reply) == bytes(byte ^ 0xFF for byte in source)
            channel.send(Frames(b"null"))
            assert channel.receive(WAIT_S).control == b"null"
        listener.interrupt()
        thread.join(WAIT_S)
    assert driver.copies == 0
    assert driver.synchronised == 2
