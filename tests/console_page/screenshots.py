"""Makes the pictures of docs/console/ again: ``python -m tests.console_page.screenshots``.

What the worker saw is real in all of them: servers of the default model, at masked and at open. Pauses, keys and cheats
are played from a script.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome

from tests.commands import Home
from tests.console_page.browser import chromium
from tests.console_page.fake_server import Cut, Failure, FakeServer, Gate, Named, Step, fake_server
from tests.console_page.page import Page
from tests.server.process import serving

FOLDER = Path(__file__).parents[2] / "docs" / "console"
QUESTION = "My password is swordfish. Is it a good one?"
BEGINNING = "A password that is a single word of a dictionary can be guessed within seconds."
MOST_BYTES = 200_000
COLOURS = 160  # of a picture file: enough for the page, and small
WIDE, NARROW = (1280, 1040), (360, 740)
SCHEMES = {"light": False, "dark": True}


def main() -> None:
    """Each state in the light, and those that differ most in the dark too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--states", action="store_true", help="only what is played from a script")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as chrome:
        states(chrome, options.folder)
        if not options.states:
            answers(chrome, options.folder)


def answers(chrome: Chrome, folder: Path) -> None:
    """A real answer at masked and at open, and the two panels side by side."""
    panels: dict[str, list[Image.Image]] = {name: [] for name in SCHEMES}
    for protection in ("masked", "open"):
        home = Home()
        options = ("--protection", protection, "--console", "--port", 0)
        with ExitStack() as stack:
            stack.callback(home.remove)
            server = stack.enter_context(serving(home, *options))
            for name, dark in SCHEMES.items():
                page = Page(chrome, server.address + "/", width=WIDE[0], height=WIDE[1], dark=dark)
                _ask(page)
                save(page, folder / f"{protection}-{name}.png")
                panels[name].append(panel(page))
                page.resize(*NARROW)
                page.run("document.getElementById('end').scrollIntoView({ block: 'end' })")
                save(page, folder / f"{protection}-narrow-{name}.png")
                page.click(".look")
                save(page, folder / f"{protection}-narrow-seen-{name}.png")
                page.close()
            server.process.send_signal(signal.SIGTERM)
            server.ended()
    for name, both in panels.items():
        write(beside(both), folder / f"masked-and-open-{name}.png")


def _ask(page: Page) -> None:
    page.wait_for("Ready")
    page.click("#options summary")
    for name, value in (("temperature", "0"), ("max-tokens", "48")):
        page.field(name).clear()
        page.field(name).send_keys(value)
    page.click("#options summary")
    page.ask(QUESTION)
    page.wait(lambda: page.texts(".numbers"))
    page.wait_for("Ready")


def states(chrome: Chrome, folder: Path) -> None:
    """What is played from a script."""
    lost = Named("state", {"state": "reconnecting", "since_s": 0.0, "expelled": []})
    caught = Failure(503, "worker_cheated", "the worker failed a check")
    busy = Failure(429, "queue_full", "another answer is looked at", retry_after_s=3)
    plays: dict[str, tuple[list[Step], str]] = {
        "answering": ([BEGINNING, Gate()], "Answering"),
        "paused": ([BEGINNING, lost, Gate()], "Paused"),
        "caught": ([BEGINNING, caught], "Caught"),
        "failed": ([BEGINNING, Cut()], "Failed"),
        "busy": ([busy], "Ready"),
    }
    with fake_server() as server:
        for name, dark in SCHEMES.items():
            shoot(chrome, server, folder / f"welcome-{name}.png", dark, lambda page: page.wait_for("Ready"))
            for play, (script, status) in plays.items():
                server.script = script

                def asked(page: Page, status: str = status) -> None:
                    page.ask(QUESTION)
                    page.wait(lambda: page.status == status and (status == "Answering" or page.texts(".note")))
                    page.wait(lambda: page.answer in ("", BEGINNING))

                shoot(chrome, server, folder / f"{play}-{name}.png", dark, asked)
            server.key = "a key"
            shoot(chrome, server, folder / f"key-{name}.png", dark, lambda page: page.wait_for("Key needed"))
            server.key = None
            shoot(chrome, server, folder / f"narrow-{name}.png", dark, lambda page: page.wait_for("Ready"), NARROW)


def shoot(
    chrome: Chrome,
    server: FakeServer,
    path: Path,
    dark: bool,
    ready: Callable[[Page], object],
    size: tuple[int, int] = WIDE,
) -> None:
    """One picture of a fresh page."""
    page = Page(chrome, server.url, width=size[0], height=size[1] * 4 // 5 if size == WIDE else size[1], dark=dark)
    page.reduce_motion()
    ready(page)
    save(page, path)
    page.close()


def panel(page: Page) -> Image.Image:
    """All of what the worker saw, also what is to be scrolled to."""
    height = page.run(
        "return document.getElementById('seen').scrollHeight + document.querySelector('.top').offsetHeight"
    )
    page.resize(WIDE[0], height)
    image = _image(page.one("#seen").screenshot_as_png)
    page.resize(*WIDE)
    return image


def beside(images: list[Image.Image]) -> Image.Image:
    """Pictures in a row, from the top."""
    row = Image.new("RGB", (sum(one.width for one in images), max(one.height for one in images)))
    at = 0
    for one in images:
        ground = one.crop((one.width - 2, one.height - 2, one.width - 1, one.height - 1))
        row.paste(ground.resize((one.width, row.height)), (at, 0))
        row.paste(one, (at, 0))
        at += one.width
    return row


def save(page: Page, path: Path) -> None:
    """What is in the window."""
    write(_image(page.chrome.get_screenshot_as_png()), path)


def write(image: Image.Image, path: Path) -> None:
    """A small file. Raises ValueError where it is none."""
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    if size >= MOST_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes")


def _image(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png)).convert("RGB")


if __name__ == "__main__":
    main()
