"""What a run uses of its connection, whether one worker is there or several are."""

from __future__ import annotations

from typing import Literal, Protocol

from tsqp.config.model import ModelConfig
from tsqp.errors import ChannelError
from tsqp.trusted.guard.sources import PendingBytes
from tsqp.wire.messages import Call, Welcome
from tsqp.wire.slot import Slot


class Connection(Protocol):
    """A session with one worker, or a team. After any error that ends it every call raises that error."""

    config: ModelConfig
    welcome: Welcome

    @property
    def address(self) -> str:
        """The address really in use, as a user would type it; of a team, each of its workers'."""

    @property
    def transport(self) -> str:
        """The transport really in use."""

    @property
    def ended(self) -> ChannelError | None:
        """What has ended it, None while it goes on."""

    def next_id(self) -> int:
        """A call id that no earlier call had."""

    def slot(self, size: int, reply_bytes: int) -> Slot:
        """Memory for calls of one shape, one at a time."""

    def ask(self, kind: Literal["linear", "lm_head"], call: Call, slot: Slot) -> PendingBytes:
        """Send one call from a slot."""

    def ping(self) -> None:
        """A call that has nothing to do with any text, and its reply. Raises any ChannelError."""

    def fail(self, error: ChannelError) -> None:
        """End it: every later call raises ``error``, or what has ended it before."""

    def close(self) -> None:
        """End it. Closing twice is allowed."""
