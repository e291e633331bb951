"""Cases that were measured again take the place of theirs in the file, and the others stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tsqp.bench.earlier import check_goes_together, with_earlier
from tsqp.errors import OptionError

ORDER = ("a", "b", "c")


def of(cpu: str, **seconds: float) -> dict[str, object]:
    return {
        "threads": 2,
        "machine": {"cpu": cpu},
        "cases": [{"name": name, "s": value} for name, value in seconds.items()],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "offload.json"
    path.write_text(json.dumps(of("one", a=1.0, b=2.0)))
    return path


def test_cases_that_were_not_measured_again_stay_as_they_were(path: Path) -> None:
    assert with_earlier(of("one", c=4.0, b=3.0), path, ORDER) == of("one", a=1.0, b=3.0, c=4.0)


def test_without_a_file_there_is_nothing_to_add(tmp_path: Path) -> None:
    new = of("one", c=4.0)
    check_goes_together(tmp_path / "offload.json", "any", 2)
    assert with_earlier(new, tmp_path / "offload.json", ORDER) == new


@pytest.mark.parametrize(("cpu", "threads"), [("two", 2), ("one", 1)])
def test_cases_of_another_processor_or_of_other_threads_do_not_go_together(cpu: str, threads: int, path: Path) -> None:
    check_goes_together(path, "one", 2)
    with pytest.raises(
        OptionError, match=rf"measured on one with 2 threads, this is {cpu} with {threads}: measure all"
    ):
        check_goes_together(path, cpu, threads)
