"""What tests of commands rest on."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.commands import remove_tree


def test_a_directory_is_removed_while_somebody_else_removes_its_files(tmp_path: Path) -> None:
    for number in range(20):
        directory = tmp_path / str(number)
        files = [directory / str(name) for name in range(200)]
        directory.mkdir()
        for file in files:
            file.touch()

        def tidy(files: list[Path] = files) -> None:
            for file in files:
                file.unlink(missing_ok=True)

        other = threading.Thread(target=tidy)
        other.start()
        remove_tree(directory)
        other.join()
        assert not directory.exists()
