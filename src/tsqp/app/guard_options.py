"""What can be chosen about the private modes, checked before anything is started."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tsqp.errors import OptionError

DEALER = "dealer="
MAX_CHECKS = 16


@dataclass(frozen=True)
class GuardOptions:
    """How products are checked and where pads come from. Everything but the first two is for ``masked`` only.

    ``checks``: check vectors; a cheating worker goes unnoticed with probability 2^(-31·checks) a session.
    ``model_digest``: refuse any other model than the one with this digest. ``pad_source``: ``tee`` (this process
    multiplies pads by the weights) or ``dealer=ADDR`` (a second worker that does not collude with the first).
    ``dealer_key``: the file of the dealer's public key, for tcp; ``dealer_no_separation``: accept a dealer over shm, ipc
    or plain tcp on this host, where whoever runs the worker can read what the dealer says. ``pads_ahead``: tokens
    whose pads are kept ready, as far as ``pad_memory`` bytes allow. ``pads_empty``: ``wait`` for missing pads to be made,
    or ``refuse``. ``warm_pads``: fill the pool before the first call.
    """

    checks: int = 2
    model_digest: str | None = None
    pad_source: str = "tee"
    dealer_key: str | None = None
    dealer_no_separation: bool = False
    pads_ahead: int = 256
    pad_memory: int = 1 << 30
    pads_empty: str = "wait"
    warm_pads: bool = False

    @property
    def dealer(self) -> str | None:
        """The dealer's address."""
        return self.pad_source.removeprefix(DEALER) if self.pad_source.startswith(DEALER) else None

    def check(self) -> None:
        """Raises OptionError that names what is wrong."""
        if not 1 <= self.checks <= MAX_CHECKS:
            raise OptionError(f"there must be 1 to {MAX_CHECKS} checks, not {self.checks}")
        if self.model_digest is not None and not re.fullmatch("[0-9a-f]{64}", self.model_digest):
            raise OptionError("a model digest is 64 hex digits: --stats of a run in a private mode shows it")
        if self.pad_source != "tee" and not self.dealer:
            raise OptionError(f"unknown pad source '{self.pad_source}': use tee or dealer=ADDR")
        if self.pads_ahead < 0:
            raise OptionError(f"pads can be kept ahead for 0 or more tokens, not {self.pads_ahead}")
        if self.pad_memory < 0:
            raise OptionError(f"the memory for pads must be 0 or more bytes, not {self.pad_memory}")
        if self.pads_empty not in ("wait", "refuse"):
            raise OptionError(f"pads_empty is wait or refuse, not '{self.pads_empty}'")
