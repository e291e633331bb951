"""Binds a configuration that is not part of the measured image to the quotes of a confidential VM.

    python -P measure_config.py show FILE            what a client's policy has to name
    python -P measure_config.py measure FILE COPY    in the guest, as root, once after each boot

The server reads COPY, in memory of the guest: FILE may be another one the next time that the host is asked for it.

TDX: RTMR 3 is extended by the SHA-384 of the file; it has to be fresh, or to hold that already. SEV-SNP has no such
register: the host gives the SHA-256 of the file as HOST_DATA when it starts the guest, and here the file is compared
with it. Swap has to be off: a swap of the guest is a disk of the host. Whatever is not as it should be ends this with
one line and exit code 1, and a server that requires it does not start.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from tsqp.errors import TsqpError
from tsqp.tee.providers import ConfigfsTsm
from tsqp.tee.quotes.snp_report import MalformedReport, SnpReport

RTMR3 = Path("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384")  # Linux 6.16 and later
SWAPS = Path("/proc/swaps")
FRESH = bytes(48)


class NotMeasured(Exception):
    """One line that says why."""


def extended(register: bytes, digest: bytes) -> bytes:
    """What a register of 48 bytes holds after an extension."""
    return hashlib.sha384(register + digest).digest()


def shown(configuration: bytes) -> str:
    """Lines for the sections of a policy."""
    sha384, sha256 = hashlib.sha384(configuration).digest(), hashlib.sha256(configuration).digest()
    return f'[tdx]\nrtmr3 = ["{extended(FRESH, sha384).hex()}"]\n\n[sev-snp]\nhost-data = ["{sha256.hex()}"]\n'


def extend_rtmr3(configuration: bytes, register: Path) -> None:
    """Raises NotMeasured unless the register holds this configuration, and nothing else, afterwards."""
    if not register.exists():
        raise NotMeasured(f"there is no {register}: Linux 6.16 has it. Or put the file into the measured image")
    digest = hashlib.sha384(configuration).digest()
    wanted = extended(FRESH, digest)
    found = register.read_bytes()
    if found == FRESH:
        with register.open("r+b", buffering=0) as file:
            file.write(digest)  # all 48 bytes at once, as the kernel wants
        found = register.read_bytes()
    if found != wanted:
        raise NotMeasured(f"RTMR 3 is {found.hex()}, not {wanted.hex()}: something else was measured since the boot")


def compare_host_data(configuration: bytes, provider: ConfigfsTsm) -> None:
    """Raises NotMeasured unless the host started this guest for this configuration."""
    found = SnpReport.parse(provider.quote(bytes(64)).quote).host_data
    wanted = hashlib.sha256(configuration).hexdigest()
    if found != wanted:
        raise NotMeasured(f"HOST_DATA is {found}, not {wanted}: the host started this guest for another configuration")


def measure(configuration: bytes, provider: ConfigfsTsm, *, register: Path = RTMR3, swaps: Path = SWAPS) -> None:
    """Raises NotMeasured, and TsqpError or MalformedReport where the guest gives no quote."""
    if len(swaps.read_text("ascii").splitlines()) > 1:  # the first line is a heading
        raise NotMeasured("swap is on: what is in memory would reach a disk of the host. swapoff --all")
    if provider.kind() == "tdx":
        extend_rtmr3(configuration, register)
    else:
        compare_host_data(configuration, provider)


def main() -> None:
    match sys.argv[1:]:
        case ["show", file]:
            sys.stdout.write(shown(Path(file).read_bytes()))
        case ["measure", file, copy]:
            configuration = Path(file).read_bytes()  # once: what is measured is what is copied
            try:
                measure(configuration, ConfigfsTsm())
            except (NotMeasured, MalformedReport, TsqpError) as error:
                raise SystemExit(f"not measured: {error}") from None
            Path(copy).write_bytes(configuration)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
