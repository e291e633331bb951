"""Users of this machine, as operators write them."""

from __future__ import annotations

import pwd

from tsqp.errors import OptionError


def user_id(name: str, field: str) -> int:
    """The number of a user given by name or number; ``field`` is the option that has it. Raises OptionError."""
    if name.isascii() and name.isdecimal():
        return int(name)  # in a container the other side's users have no names
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise OptionError(f"{field}: this machine has no user {name[:64]!a}", fields=(field,)) from None
