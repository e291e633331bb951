"""Products under way: when they are computed, and in which order computations that run together go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tsqp.model.pending import CACHE_BARRIER, Deferred, Joined, NotKept, Private, Steps, interleaved, run


class Noted(NotKept):
    """A product that notes when it is asked for and when it is waited for."""

    def __init__(self, name: str, notes: list[str], value: float = 0.0) -> None:
        notes.append(f"ask {name}")
        self._name, self._notes, self._value = name, notes, value

    def wait(self) -> torch.Tensor:
        self._notes.append(f"wait {self._name}")
        return torch.tensor([self._value])


def test_a_deferred_product_is_computed_when_it_is_waited_for() -> None:
    notes: list[str] = []
    product = Deferred(lambda: Noted("a", notes, 3.0).wait())
    assert not notes
    assert product.wait().tolist() == [3.0]


def test_a_private_product_is_a_copy() -> None:
    shared = torch.zeros(3)
    own = Private(Deferred(lambda: shared)).wait()
    own += 1
    assert not shared.any()


def test_joined_products_are_side_by_side_in_their_order() -> None:
    parts = [Deferred(lambda value=value: torch.full((2, 1), value)) for value in (1.0, 2.0)]  # type: ignore[misc]
    assert Joined(parts).wait().tolist() == [[1.0, 2.0]] * 2


def test_run_resumes_with_each_product_and_gives_the_end() -> None:
    notes: list[str] = []

    def steps() -> Steps[str]:
        first = yield Noted("a", notes, 1.0)
        second = yield Noted("b", notes, 2.0)
        return f"{first.item()} {second.item()}"

    assert run(steps()) == "1.0 2.0"
    assert notes == ["ask a", "wait a", "ask b", "wait b"]


def test_an_error_of_a_product_reaches_whoever_runs() -> None:
    def steps() -> Steps[None]:
        yield Deferred(lambda: torch.zeros(2, 2) @ torch.zeros(3, 3))

    with pytest.raises(RuntimeError):
        run(steps())


def part(name: str, notes: list[str], *, turns: bool = False, products: int = 2) -> Steps[None]:
    """Two products, each after a turn if there are any; what comes back is the product that was asked for."""
    for number in range(products):
        if turns:
            yield CACHE_BARRIER
            notes.append(f"turn {name}{number}")
        value = yield Noted(f"{name}{number}", notes, float(ord(name) + number))
        assert value.item() == ord(name) + number


def test_each_part_runs_while_the_others_wait() -> None:
    notes: list[str] = []
    run(interleaved([part("a", notes), part("b", notes)]))
    assert notes == [
        *("ask a0", "ask b0"),
        *("wait a0", "ask a1", "wait b0", "ask b1"),
        *("wait a1", "wait b1"),
    ]


@pytest.mark.parametrize("lengths", [(3, 1), (1, 3), (0, 2), (2, 0), (0, 0)])
def test_parts_of_different_length_all_come_to_their_end(lengths: tuple[int, int]) -> None:
    notes: list[str] = []
    run(interleaved([part(name, notes, products=length) for name, length in zip("ab", lengths, strict=True)]))
    assert sorted(note for note in notes if note.startswith("wait")) == sorted(
        f"wait {name}{number}" for name, length in zip("ab", lengths, strict=True) for number in range(length)
    )


def test_no_part_passes_a_turn_before_the_one_in_front() -> None:
    notes: list[str] = []
    run(interleaved([part(name, notes, turns=True, products=3) for name in "abc"]))
    for number in range(3):
        order = [notes.index(f"turn {name}{number}") for name in "abc"]
        assert order == sorted(order)


def test_a_part_that_has_ended_holds_nobody_up() -> None:
    notes: list[str] = []
    run(interleaved([part("a", notes, turns=True, products=1), part("b", notes, turns=True, products=3)]))
    assert [note for note in notes if note.startswith("turn")] == ["turn a0", "turn b0", "turn b1", "turn b2"]


def test_one_computation_alone_runs_as_it_is() -> None:
    notes, alone = [], []  # type: ignore[var-annotated]
    run(interleaved([part("a", notes, turns=True, products=3)]))
    run(part("a", alone, turns=True, products=3))
    assert notes == alone != []


def test_a_turn_alone_waits_for_nothing() -> None:
    ends: list[str] = []

    def steps(end: Callable[[], None]) -> Steps[None]:
        yield CACHE_BARRIER
        end()

    run(interleaved([steps(lambda: ends.append("a")), steps(lambda: ends.append("b"))]))
    assert ends == ["a", "b"]
    assert CACHE_BARRIER.wait().numel() == 0
