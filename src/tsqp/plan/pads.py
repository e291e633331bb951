"""How long the pads of one token of an answer take, and what of that is beside the passes: ``docs/scaling.md`` §1."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.plan.cluster import Setting
from tsqp.plan.constants import Constants
from tsqp.plan.passes import Y_BYTES, enciphered, numbers_of, scaled, weights_of

PAD_ROWS = 256  # whose products are made at once


@dataclass(frozen=True)
class PadTimes:
    """Seconds of the pads of one token of an answer.

    ``own``: the trusted side's cores, which expand and check the pads of dealers too, and make all others. ``made``
    and ``crossed``: the dealers' products, and their way here; 0 where there are no dealers.
    """

    own: float
    made: float = 0.0
    crossed: float = 0.0

    @property
    def beside(self) -> float:
        """What goes on beside passes."""
        return max(self.made, self.crossed)

    @property
    def by_themselves(self) -> float:
        """Seconds where there are no passes."""
        return max(self.own, self.beside)

    def lasting(self, token_s: float) -> float:
        """Seconds of a token whose pass takes ``token_s``, where no pads are ready."""
        return max(token_s + self.own, self.beside)

    def bind(self, token_s: float) -> bool:
        """Whether pads are most of a token whose pass takes ``token_s``."""
        return self.own > token_s or self.beside > token_s + self.own


def pad_times(constants: Constants, setting: Setting) -> PadTimes:
    """Of a masked setting. A dealer's line over tcp has keys, whatever the workers' lines have."""
    trusted, config = constants.trusted, setting.config
    weights, numbers = sum(weights_of(config)), sum(numbers_of(config))
    own = numbers * trusted.pad_number_s / setting.cores
    if not setting.dealers:
        return PadTimes(own + weights * trusted.pad_weight_s / setting.cores)
    device = constants.devices[setting.device]
    product = scaled(device.products["masked"], device.cores, setting.worker_cores)
    made = product.seconds(weights, PAD_ROWS, numbers) / PAD_ROWS / setting.dealers
    sent = numbers_of(config)[1] * Y_BYTES
    crossed = sent / setting.link.rate_of(setting.dealers)
    if setting.link.transport == "tcp":
        crossed += trusted.byte_s * enciphered(sent, setting.dealers, setting.cores)
    return PadTimes(own, made, crossed)
