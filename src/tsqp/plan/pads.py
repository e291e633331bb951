"""How long the pads of a token or of a prompt take, and what of that is beside the passes: ``docs/scaling.md`` §1."""

from __future__ import annotations

from dataclasses import dataclass

from tsqp.plan.cluster import Setting
from tsqp.plan.constants import Constants
from tsqp.plan.passes import Y_BYTES, enciphered, numbers_by_part, scaled, weights_of

PAD_ROWS = 256  # whose products are made at once


@dataclass(frozen=True)
class PadTimes:
    """Seconds of the pads of one pass.

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

    def lasting(self, pass_s: float) -> float:
        """Seconds of a pass that takes ``pass_s`` by itself, where no pads are ready."""
        return max(pass_s + self.own, self.beside)

    def bind(self, pass_s: float) -> bool:
        """Whether pads are most of a pass that takes ``pass_s`` by itself."""
        return self.own > pass_s or self.beside > pass_s + self.own


def pad_times(constants: Constants, setting: Setting, rows: int = 1) -> PadTimes:
    """Of a masked setting: ``rows`` of each group of the layers and one of the LM head.

    So they are the pads of one token of an answer, or of a prompt of ``rows`` tokens, whose last row alone crosses the
    head. A dealer's line over tcp has keys, whatever the workers' lines have.
    """
    trusted, config = constants.trusted, setting.config
    layers, head = weights_of(config)
    of_layers, of_head = numbers_by_part(config)
    weights, received = rows * layers + head, rows * of_layers[1] + of_head[1]
    numbers = rows * of_layers[0] + of_head[0] + received
    own = numbers * trusted.pad_number_s / setting.cores
    if not setting.dealers:
        return PadTimes(own + weights * trusted.pad_weight_s / setting.cores)
    device = constants.devices[setting.device]
    product = scaled(device.products["masked"], device.cores, setting.worker_cores)
    made = product.seconds(weights, PAD_ROWS, numbers) / PAD_ROWS / setting.dealers
    sent = received * Y_BYTES
    crossed = sent / setting.link.rate_of(setting.dealers)
    if setting.link.transport == "tcp":
        crossed += trusted.byte_s * enciphered(sent, setting.dealers, setting.cores)
    return PadTimes(own, made, crossed)
