"""Text and paths beyond ASCII under a locale that knows ASCII alone: the same bytes in, the same bytes out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import LIMIT_S, TSQP, Home
from tests.families import tiny_model

LOCALES = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
SAMPLED = ("--protection", "local", "--dtype", "float32", "--ignore-eos", "-n", "40")
TEXT = "é, 漢字 and 🙂"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with a name, and with a template, beyond ASCII."""
    directory = tmp_path / "modèle"
    shutil.copytree(tiny_model("llama").directory, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def run(
    home: Home, locale: str, *arguments: str | bytes | Path, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """One command, its arguments in UTF-8 whatever the locale of this process."""
    words = [word if isinstance(word, bytes) else os.fsencode(word) for word in (*TSQP, *arguments)]
    environment = {name: value for name, value in home.environment.items() if not name.startswith(("PYTHON", "LC_"))}
    done = subprocess.run(
        words,
        input=stdin,
        capture_output=True,
        env={**environment, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **LOCALES[locale]},
        timeout=LIMIT_S,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return done


def answer(home: Home, locale: str, *arguments: str | bytes | Path, stdin: bytes = b"") -> bytes:
    done = run(home, locale, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_prompt_is_the_same_wherever_it_comes_from(home: Home, model: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "é.txt"
    prompt.write_text(TEXT, encoding="utf-8")
    asked = ("generate", "--model", model, *SAMPLED, "--json")
    expected = json.loads(answer(home, "utf-8", *asked, "--", TEXT.encode()))["token_ids"]
    other = json.loads(answer(home, "utf-8", *asked, "--", b"e"))["token_ids"]
    assert expected != other  # the prompt matters
    for source in ((TEXT.encode(),), ("-",), ("--prompt-file", prompt)):
        output = answer(home, "ascii", *asked, *source, stdin=TEXT.encode())
        assert json.loads(output)["token_ids"] == expected


@pytest.mark.slow
def test_an_answer_is_the_same_bytes(home: Home, model: Path) -> None:
    asked = ("generate", TEXT.encode(), "--model", model, *SAMPLED)
    outputs = [answer(home, locale, *asked) for locale in LOCALES]
    assert outputs[0] == outputs[1]
    assert not outputs[0].isascii()


def test_an_encoding_that_was_asked_for_is_kept(home: Home, model: Path) -> None:
    words = [os.fsencode(str(word)) for word in (*TSQP, "generate", "a", "--model", model, *SAMPLED)]
    environment = {**home.environment, **LOCALES["ascii"], "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"?" in done.stdout


@pytest.mark.slow
def test_a_conversation_is_the_same(home: Home, model: Path) -> None:
    asked = ("chat", "--model", model, *SAMPLED, "--system", TEXT.encode())
    outputs = [answer(home, locale, *asked, stdin=f"{TEXT}\n".encode()) for locale in LOCALES]
    assert outputs[0] == outputs[1] != answer(home, "ascii", *asked, stdin=b"e\n")


@pytest.mark.slow
def test_a_stop_string_is_found(home: Home, model: Path) -> None:
    asked = ("generate", "a", "--model", model, *SAMPLED)
    whole = answer(home, "utf-8", *asked).decode().rstrip("\n")
    stop = next(character for character in whole if not character.isascii())
    for locale in LOCALES:
        output = answer(home, locale, *asked, "--stop", stop.encode())
        assert output.decode().rstrip("\n") == whole.partition(stop)[0]


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("generate", b"a\xff"), b"the prompt"),
        (("generate", "é".encode() + b"\xe9"), b"the prompt"),
        (("generate", "a", "--stop", b"\xff"), b"--stop"),
        (("chat", "--system", b"\xff"), b"--system"),
    ],
)
def test_bytes_that_are_no_text_are_refused_in_one_line(
    home: Home, model: Path, locale: str, arguments: tuple[str | bytes, ...], what: bytes
) -> None:
    done = run(home, locale, *arguments, "--model", model, "--protection", "local")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [b"tsqp: error: " + what + b" is not UTF-8 text"]
    assert done.stdout == b""


def test_an_error_about_a_path_is_one_line(home: Home) -> None:
    for locale in LOCALES:
        done = run(home, locale, "generate", "a", "--model", "/nowhere/é".encode())
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if b"error: " in line]
        assert len(errors) == 1
        assert b"/nowhere/" in errors[0]
