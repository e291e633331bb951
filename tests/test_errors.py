"""An error names options by their fields; whoever prints the error chooses other names for them."""

from __future__ import annotations

from tsqp.errors import OptionError, TsqpError, WorkerLost


def test_the_text_ends_with_the_hint() -> None:
    error = OptionError("guard.checks must be less", hint="leave out guard.checks", fields=("guard.checks",))
    assert str(error) == "guard.checks must be less: leave out guard.checks"
    assert error.explained(str.upper) == "GUARD.CHECKS must be less: leave out GUARD.CHECKS"


def test_only_what_it_names_is_replaced_and_only_whole_names() -> None:
    text = "key, my.key, keys and key_file, not worker.key; seed"
    assert TsqpError(text, fields=("key",)).explained(lambda _: "--key") == text.replace("key,", "--key,", 1)
    assert TsqpError(text).explained(lambda _: "--key") == text
    both = TsqpError("key and worker.key", fields=("key", "worker.key"))
    assert both.explained(lambda name: f"<{name}>") == "<key> and <worker.key>"


def test_what_a_user_gave_is_no_pattern_and_no_template() -> None:
    error = OptionError("guard.checks must be 1, not {0} \\1 %s", fields=("guard.checks",))
    assert error.explained(lambda _: r"\g<0>{}") == r"\g<0>{} must be 1, not {0} \1 %s"


def test_an_error_says_whom_it_is_about() -> None:
    error = WorkerLost("gone", side="dealer", address="ipc:///x")
    assert (error.side, error.address, error.fields, error.hint) == ("dealer", "ipc:///x", (), None)
