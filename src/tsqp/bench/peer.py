"""What is measured beside ours: the same weights unsplit, in Hugging Face transformers."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from rich.console import Console

from tsqp.api.llm import LLM
from tsqp.bench.child import Child
from tsqp.bench.names import PEER_PACKAGES, PeerName
from tsqp.checkpoint import open_checkpoint
from tsqp.checkpoint.hf_config import hf_config_of
from tsqp.config.dtype import DtypeName
from tsqp.errors import OptionError, WorkerFailed
from tsqp.launch.local import worker_environment
from tsqp.trusted.engine.sampling_params import SamplingParams


def is_installed(name: PeerName) -> bool:
    """Whether what a peer needs is here."""
    needed = PEER_PACKAGES.get(name)
    return needed is None or importlib.util.find_spec(needed) is not None


def say_missing(name: PeerName, console: Console) -> None:
    """That there is a measurement without this peer, and what would add it."""
    console.print(f"without {name}: pip install 'tsqp[bench]' adds it", highlight=False, markup=False, soft_wrap=True)


def choose_peer(name: PeerName | None, console: Console) -> PeerName:
    """The peer asked for; transformers where it is installed when nothing was. Raises OptionError."""
    if name is None and not is_installed("transformers"):
        say_missing("transformers", console)
        return "none"
    if name is not None and not is_installed(name):
        raise OptionError(f"--peer {name} needs {PEER_PACKAGES[name]}: pip install 'tsqp[bench]'")
    return name or "transformers"


class Peer(Protocol):
    """Something else that runs the same model."""

    name: str

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """Seconds of one pass over the prompt, and of ``steps`` tokens one at a time after it."""


class Ours:
    """This package itself."""

    name = "TSQP linear, bfloat16"  # as a peer

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run."""
        stats = self._llm.stats
        stats.reset()
        self._llm.generate(tokens, SamplingParams(max_tokens=steps + 1, ignore_eos=True))
        return stats.prefill_s, stats.decode_s


class TransformersPeer:
    """transformers with a checkpoint's weights and ``threads`` threads, in a process of its own. A context manager.

    Our own processes wait passively (docs/adr/0013). No user of transformers asks for that, and its tokens take longer
    by it: so its process does not. Raises UnsupportedModel, WorkerUnreachable, WorkerFailed.
    """

    def __init__(self, model: str, dtype: DtypeName, device: str, threads: int) -> None:
        hf_config_of(open_checkpoint(model).config, dtype)  # what cannot be written is refused here, in our words
        environment = worker_environment()
        del environment["OMP_WAIT_POLICY"]
        arguments = model, dtype, device, str(threads)
        self._process = Child("tsqp.bench.transformers_server", *arguments, environment=environment)
        try:
            self.name = str(_checked(self._process.ready)["name"])
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, tokens: list[int], steps: int) -> tuple[float, float]:
        """See Peer.run. Raises WorkerFailed."""
        return self.run_together([tokens], steps)

    def run_together(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        """See TransformersModel.run_together: by that process's clock. Raises WorkerFailed."""
        answer = _checked(self._process.ask({"prompts": prompts, "steps": steps}))
        return answer["prefill_s"], answer["decode_s"]

    def close(self) -> None:
        """End its process."""
        self._process.close()

    def __enter__(self) -> TransformersPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is no error. Raises WorkerFailed."""
    if "error" in answer:
        raise WorkerFailed(f"transformers failed: {answer['error']}")
    return answer
