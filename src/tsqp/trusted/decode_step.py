"""A step of few rows of a private mode in one piece of compiled code: tables in, logits out.

Its rows are those of a decode step, one of each answer, and some of prompts beside them. What a step needs besides its
numbers depends on the count of rows alone, and on how many have logits: the packet of each call, where its input and
its reply lie, the guard's vectors and scales. That is laid out once (``_Plan``). For each step there are the pads,
taken from the pool as ever, the places of keys and values, and room for what comes. ``step_loops.decode`` does the
rest, without the interpreter, which between two calls costs more than all arithmetic of a row.

It comes back early where Python has to act: attention over so many keys that threads share it; an answer that takes
long, or that is not plainly good, which the channel then deals with as with any other; rows that the guard refuses.
After a failure the session is over and all pads of the step are lost, as after any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tsqp.arith.bits import Array, bits
from tsqp.arith.crew import new_board
from tsqp.arith.expand import BLOCK_ROWS
from tsqp.arith.row_threads import row_threads
from tsqp.config.groups import GroupKey, group_keys
from tsqp.config.model import ModelConfig
from tsqp.errors import NumericError, PadsExhausted
from tsqp.model.adapter_loops import ADAPTER_NUMBERS
from tsqp.model.adapters import Adapters
from tsqp.model.batch import SequenceRows
from tsqp.model.block_attention import NO_WINDOW, SPLIT_PAIRS, BlockAttention, BlocksOfChunk, words
from tsqp.model.cache import KVCache
from tsqp.model.decoder_layers import ChunkWork, Norms
from tsqp.model.meter import CallKind, OperatorKind
from tsqp.trusted import step_loops as loops
from tsqp.trusted.guard.linears import CheckedLinears, lose, refuse
from tsqp.trusted.guard.pads import PadBlock
from tsqp.trusted.guard.pool import PadSlice
from tsqp.trusted.remote.session import WorkerSession
from tsqp.trusted.step_helpers import Helpers
from tsqp.wire import exchange
from tsqp.wire.channel import DirectLine
from tsqp.wire.codec import encode
from tsqp.wire.direct import done_start, put_line
from tsqp.wire.messages import Done, Product
from tsqp.wire.slot import KEPT_ROWS, Slot

KINDS = {"qkv": loops.QKV, "o": loops.O, "gate_up": loops.GATE_UP, "down": loops.DOWN, "lm_head": loops.LM_HEAD}
WIDE_ID = 0x2123456789ABCDEF  # its encoding has 8 bytes of number, as those of a step have whatever the number is
MOST_ROWS = KEPT_ROWS  # of a step: the worker, too, has its loop for calls of so many
PLANS = 4  # that are kept: of answers alone, beside a prompt, and at its end
MOST_THREADS = 4  # that share the rows of a step: each more is woken for each call
SHARE_NUMBERS = 1 << 17  # computed between two calls, from which on waking another thread pays

Spans = Sequence[SequenceRows[KVCache]]


@dataclass(frozen=True)
class Model:
    """What the layers of a run have besides their products."""

    config: ModelConfig
    norms: Norms
    attention: BlockAttention
    cache_dtype: torch.dtype
    adapters: Adapters | None = None


class DecodeStep:
    """Steps of few rows of one run, over a line that its worker's channel has for them."""

    most_rows = MOST_ROWS

    def __init__(self, model: Model, linears: CheckedLinears, session: WorkerSession, line: DirectLine) -> None:
        self._model = model
        self._linears = linears
        self._session = session
        self._line = line
        self._plans: dict[tuple[int, int], _Plan] = {}  # the one that was used last is the last
        self._helpers = Helpers(min(row_threads().threads, MOST_THREADS) - 1)

    @classmethod
    def of(cls, model: Model, linears: CheckedLinears, session: WorkerSession) -> DecodeStep | None:
        """None where the plain way is the only one: over other transports, with caches of int8, for other blocks.

        The loop knows Llama's block alone (``ModelConfig.plain_block``), with any rotary embedding, window and scale.
        """
        line = session.direct()
        if line is None or not model.config.plain_block or model.cache_dtype not in (torch.float32, torch.bfloat16):
            return None
        step = cls(model, linears, session, line)
        step.compile()
        return step

    def compile(self) -> None:
        """Have numba compile the loop by a step that is over before its first call, so that no step waits for it."""
        plan, config = self._plan(1, 1), self._model.config
        table, attention = torch.zeros(len(config.ropes), 1, config.head_dim), BlocksOfChunk(self._model.attention, ())
        q = torch.zeros(config.num_heads, 1, config.head_dim, dtype=self._model.cache_dtype)
        work = ChunkWork(table, table, (), q, attention)
        plan.at[loops.CALL] = len(plan.keys)
        hidden, logits = torch.zeros(1, config.hidden_size), torch.zeros(1, config.vocab_size)
        loops.decode(new_board(0), 0, *plan.arguments(bits(hidden), bits(logits), [0], work, ()))

    def close(self) -> None:
        """Let go of the memory of the connection, and of the guard's. Closing twice is allowed."""
        self._plans.clear()
        self._helpers.close()

    def serves(self, wanted: Sequence[int]) -> bool:
        """Whether it takes a step of so few rows: one that has logits, where nobody wants to see every call."""
        return len(wanted) > 0 and self._session.stats.trace is None

    def run(self, hidden: torch.Tensor, spans: Spans, wanted: Sequence[int], work: ChunkWork) -> torch.Tensor:
        """Logits, float32 (W, vocab_size), of the rows ``wanted`` of hidden states float32 (R, hidden_size).

        Changes the hidden states, and appends to the caches. Raises as products of ``CheckedLinears`` do.
        """
        linears, plan = self._linears, self._plan(len(hidden), len(wanted))
        ids = self._session.direct_ids(len(plan.keys))  # first: whoever asks a session that is over hears why it is
        taken: list[Sequence[PadSlice]] = []
        try:
            for n, key in enumerate(plan.keys):
                taken.append(linears.pads.take(key, plan.rows_of(key)))
                linears.pads.supply(key, taken[-1])
                if linears.masked:
                    plan.point_at(n, taken[-1])
            return self._through(plan, ids, hidden, spans, wanted, work)
        except BaseException as error:
            if not isinstance(error, PadsExhausted | NumericError):  # which no call is under way at
                linears.end(error)
            for slices in taken:
                lose(slices)
            raise

    def _plan(self, rows: int, wanted: int) -> _Plan:
        plan = self._plans.pop((rows, wanted), None)
        if plan is None:
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            plan = _Plan(self._model, self._linears, self._session, self._line, rows, wanted)
        self._plans[rows, wanted] = plan
        return plan

    def _through(
        self, plan: _Plan, ids: int, hidden: torch.Tensor, spans: Spans, wanted: Sequence[int], work: ChunkWork
    ) -> torch.Tensor:
        logits = torch.empty(plan.wanted, self._model.config.vocab_size)
        plan.at[:] = 0, loops.OPERATE, self._line.numbers(len(plan.keys)), ids
        arguments = plan.arguments(bits(hidden), bits(logits), wanted, work, spans)
        blocks = BlocksOfChunk(self._model.attention, spans)
        with self._helpers.beside(loops.decode, arguments, rows=plan.rows) as board:
            while True:
                why, size = loops.decode(board, 0, *arguments)
                if why == loops.OVER:
                    break
                if why == loops.ATTEND:
                    mixed = plan.x[: plan.rows * work.q[:, 0].numel()].view(plan.rows, -1)
                    self._model.attention.attend_all(plan.layer(), work.q, blocks, mixed)
                elif why == loops.REFUSED:
                    refuse(plan.verdicts)
                else:
                    self._settle(plan, why - loops.LINE, size)
        self._count(plan, ids)
        return logits

    def _settle(self, plan: _Plan, why: int, size: int) -> None:
        """Have the channel deal with what the loop has left, and the loop go on with the answer."""
        call, number = int(plan.at[loops.CALL]), int(plan.at[loops.SEQUENCE])
        unsent = plan.packet(call) if why == exchange.UNSENT else b""
        came = bytes(plan.answer[:size]) if why == exchange.UNUSUAL else b""
        control = self._line.settle(plan.slot(call), number, self._session.deadline_s, unsent=unsent, came=came)
        asked = int(plan.at[loops.ID])
        # As a plain answer, for which there is room: a worker may say more than how long it was busy.
        plan.keep_answer(call, encode(Done(asked, self._session.busy_ns(control, asked))))
        plan.at[loops.NEXT] = loops.TAKE

    def _count(self, plan: _Plan, ids: int) -> None:
        """Read what the worker has said, once more as the messages that they are; and count everything."""
        stats, linears = self._session.stats, self._linears
        busy = [self._session.busy_ns(plan.answered(call), ids + call) for call in range(len(plan.keys))]
        linears.products_checked += len(plan.keys)
        times = plan.times * 1e-9
        line = times[:, loops.ARRIVED] - times[:, loops.MASKED]
        kinds: tuple[tuple[CallKind, slice], ...] = ("linear", slice(0, -1)), ("lm_head", slice(-1, None))
        for kind, which in kinds:
            row, spent = stats.calls[kind], float(line[which].sum())
            row.count += len(line[which])
            row.rpc_s += spent
            row.held_s += spent
            row.worker_s += min(sum(busy[which]) * 1e-9, spent)  # it cannot have computed for longer
            row.bytes_sent += sum(plan.sent_bytes[which])
            row.bytes_received += sum(plan.reply_bytes[which])
        steps = np.diff(times, axis=1)  # by their ends
        for operator, seconds in plan.operators(steps).items():
            if seconds or operator in stats.operator_s:
                stats.operator_s[operator] = stats.operator_s.get(operator, 0.0) + seconds


class _Plan:
    """What steps of R rows, W of them with logits, have in common, and room for the one under way.

    Tables are as ``step_loops`` names them.
    """

    def __init__(
        self, model: Model, linears: CheckedLinears, session: WorkerSession, line: DirectLine, rows: int, wanted: int
    ) -> None:
        config = model.config
        self.rows, self.wanted, self.keys = rows, wanted, group_keys(config)
        groups = [linears.groups[key] for key in self.keys]
        checks = len(groups[0].check_vectors)
        widest_in, widest_out = max(one.in_features for one in groups), max(one.out_features for one in groups)
        self.at = np.zeros(4, np.int64)
        self.x, self._y = torch.empty(rows * widest_in), torch.empty(rows * max(g.out_features for g in groups[:-1]))
        self._private = np.empty((MOST_THREADS, widest_out), np.uint32)
        self.verdicts = np.empty(rows, np.uint8)
        self._room = np.empty(rows, np.float32), np.empty((rows, checks), np.uint32), self.verdicts
        self._item = np.zeros(1, linears.item)
        # Where there are no pads, vectors of the guard's loops read none of their numbers, at these addresses. At an
        # address that is no memory the processor takes ten times as long for that.
        self._no_pads = np.zeros(max(widest_in, widest_out), np.uint32)
        self._secrets = np.full((len(groups), rows, 2), _address(self._no_pads), np.int64)
        self._guard = linears.masked, checks, self._secrets
        self._blocks: list[PadBlock | None] = [None] * len(groups)  # whose addresses these are
        self._first = [(0, 0)] * len(groups)
        self._groups = groups
        self._layers = config.num_layers
        self._windows = np.array([window or NO_WINDOW for window in config.windows], np.int64)
        self._ropes = np.array([config.rope_index(layer) for layer in range(config.num_layers)], np.int64)
        # What adapters add: of one that does nothing where there are none, as the loop is compiled for a table.
        no_adapters = np.zeros((len(groups), 1, ADAPTER_NUMBERS), np.int64)
        self._adapters = no_adapters if model.adapters is None else model.adapters.tables
        self._work = np.float32(config.rms_norm_eps), np.float32(config.attention_scale), config.num_kv_heads
        self.times = np.zeros((len(groups), loops.TIMES), np.int64)
        self._line_of(line)
        self._lay_out(model.norms, linears, session, line)

    def _line_of(self, line: DirectLine) -> None:
        socket = np.zeros(exchange.LINE_NUMBERS, np.int64)
        put_line(socket, line)
        self.answer = np.zeros(line.packet_bytes, np.uint8)
        self._answers = np.zeros((len(self.keys), exchange.SHORT_ANSWER), np.uint8)
        self._sizes = np.zeros(len(self.keys), np.int64)
        slow = np.zeros((len(self.keys), 1), np.uint8)
        clock = np.zeros(2, np.int64)
        self._socket = socket, done_start(), self.answer, self._answers, self._sizes, slow, self.times, clock

    def _lay_out(self, norms: Norms, linears: CheckedLinears, session: WorkerSession, line: DirectLine) -> None:
        """The table of calls, and what its addresses lead to."""
        self.calls = np.zeros((len(self.keys), loops.CALL_NUMBERS), np.int64)
        self._slots: dict[str, Slot] = {}
        self._packets: list[Array] = []
        self._kept: list[Array] = []  # what the addresses lead to
        self.sent_bytes, self.reply_bytes = list[int](), list[int]()
        for n, (key, group) in enumerate(zip(self.keys, self._groups, strict=True)):
            (name, layer), rows = key, self.rows_of(key)
            sent, reply_bytes = rows * group.in_features * self._item.itemsize, rows * group.out_features * 4
            if name not in self._slots:
                self._slots[name] = session.slot(sent, reply_bytes)
            slot = self._slots[name]
            control = encode(Product(WIDE_ID, *key, rows, linears.digits))
            packet, reply = line.packet(slot, control)
            number = len(packet) - len(control) + control.index(WIDE_ID.to_bytes(8, "big"))
            self.sent_bytes.append(len(control) + sent)
            self.reply_bytes.append(reply_bytes)
            norm = norms.final if layer is None else getattr(norms.layers[layer], _NORMS.get(name, "attention"))
            arrays = [bits(norm), group.scales, group.bias, group.check_vectors, group.projections, group.bounds]
            memory = [np.frombuffer(slot.tensor, np.uint8), np.frombuffer(reply, np.uint8)]
            memory.append(np.frombuffer(packet, np.uint8).copy())
            self._packets.append(memory[-1])
            self._kept += [*arrays, *memory]
            row = [KINDS[name], layer or 0, rows, group.in_features, group.out_features]
            row += [_address(one) for one in arrays] + [group.limit] + [_address(one) for one in memory]
            self.calls[n] = [*row, len(packet), number]

    def rows_of(self, key: GroupKey) -> int:
        """Rows of a call: of the LM head those that are wanted."""
        return self.wanted if key[1] is None else self.rows

    def point_at(self, call: int, slices: Sequence[PadSlice]) -> None:
        """Where the pads of a call lie, and their products."""
        group, secrets = self._groups[call], self._secrets[call]
        for block, at, first, rows in slices:
            whole = PadSlice(block, 0, 0, BLOCK_ROWS)
            if block is not self._blocks[call]:  # most steps of an answer use the block of the step before
                self._blocks[call] = block
                self._first[call] = _address(whole.pads(group.in_features)), _address(whole.products())
            (pads, products), inner, outer = self._first[call], 4 * group.in_features, 4 * group.out_features
            for row in range(at, at + rows):
                secrets[first + row - at] = pads + row * inner, products + row * outer

    def arguments(
        self, hidden: Array, logits: Array, wanted: Sequence[int], work: ChunkWork, spans: Spans
    ) -> tuple[Any, ...]:
        """Of the loop, but for the board and the thread."""
        of_row = np.empty(0, np.int64) if work.adapters is None else work.adapters.of_row
        memory = hidden, bits(self.x), bits(self._y), logits, np.array(wanted, np.int64), self._private
        adapters = of_row, self._adapters
        operators = *self._work, SPLIT_PAIRS, bits(work.cos), bits(work.sin), bits(work.q), words(work.q)
        caches = self._places(spans), self._windows, _attention_items(spans), self._ropes, *adapters
        room = (*self._room, self._item)
        return self.at, SHARE_NUMBERS, self.calls, self._guard, memory, operators, room, caches, self._socket

    def _places(self, spans: Spans) -> Array:
        """Where keys and values of each span go, with room for them: int64 (layers, S, 5)."""
        places = np.empty((self._layers, len(spans), 5), np.int64)
        for n, span in reversed([*enumerate(spans)]):  # a cache grows for the last of its spans, and is found there
            places[:, n, 0], places[:, n, 4] = span.first, span.position
            places[:, n, 1:4] = span.cache.addresses(span.end)
        return places

    def layer(self) -> int:
        """Of the call under way."""
        return int(self.calls[self.at[loops.CALL], loops.LAYER])

    def slot(self, call: int) -> Slot:
        return self._slots[self.keys[call][0]]

    def packet(self, call: int) -> bytes:
        """As it is to be sent now."""
        return self._packets[call].tobytes()

    def keep_answer(self, call: int, control: bytes) -> None:
        """Keep an answer that the channel has received, as the loop keeps those that it has received."""
        self._sizes[call] = 8 + len(control)
        self._answers[call, 8 : 8 + len(control)] = np.frombuffer(control, np.uint8)

    def answered(self, call: int) -> bytes:
        """The control frame of the answer to a call."""
        return self._answers[call, 8 : self._sizes[call]].tobytes()

    def operators(self, steps: Array) -> dict[OperatorKind, float]:
        """Seconds of each operator; steps (calls, 6): how long after the time before it each time was."""
        kinds = self.calls[:, loops.KIND]
        rotary, own = steps[:, loops.ROTATED - 1], steps[:, loops.OPERATED - 1]
        attends = kinds == loops.O
        return {
            "rms_norm": float(own[(kinds != loops.O) & (kinds != loops.DOWN)].sum()),
            "rotary": float(rotary[attends].sum()),
            "softmax": float(own[attends].sum()),
            "silu": float(own[kinds == loops.DOWN].sum()),
            "lora": float(steps[:, loops.ADAPTED - 1].sum()),
            "mask": float(steps[:, loops.MASKED - 1].sum()),
            "check": float(steps[:, loops.CHECKED - 1].sum()),
        }


_NORMS = {"gate_up": "mlp"}


def _attention_items(spans: Spans) -> Array:
    """What threads share of attention, int64 (items, 4): a decode step, or one KV head of some rows of a prompt."""
    steps = [(n, 0, 0, span.cache.kv_heads) for n, span in enumerate(spans) if span.alone]
    prompts = [
        (n, span.rows, head, head + 1)
        for n, span in enumerate(spans)
        if not span.alone
        for head in range(span.cache.kv_heads)
    ]
    return np.array([*steps, *prompts], np.int64).reshape(-1, 4)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
