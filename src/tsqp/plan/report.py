"""A plan as numbers, and the same for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from math import ceil
from typing import Any

from tsqp.errors import OptionError
from tsqp.plan.cluster import Link, Setting, Team
from tsqp.plan.constants import Constants
from tsqp.plan.memory import PAD_MEMORY, PADS_AHEAD, memory, pad_bytes, ready_tokens
from tsqp.plan.pads import PadTimes, pad_times
from tsqp.plan.passes import Model, Parts, in_tee, numbers_of
from tsqp.plan.units import counted, rate_text, seconds_text, size_text

WORDS = {
    "calls": "calls: what each takes however small it is",
    "numbers": "the trusted side's numbers: norms, masks, checks",
    "attention": "attention on the trusted side",
    "wire": "copying and enciphering what crosses",
    "sending": "sending to the workers",
    "receiving": "receiving from the workers",
    "round_trips": "round trips",
    "losses": "waiting for lost packets",
    "launches": "what the workers' device needs for each call",
    "reading": "the workers' reading of weights",
    "multiplying": "the workers' multiplying",
    "pads": "making pads",
}


def plan(constants: Constants, setting: Setting, choices: Iterable[Team]) -> dict[str, Any]:
    """The best of the teams: the one with most decoded tokens a second of those whose workers have the memory.

    Raises OptionError where the device is unknown, or too small in all of them.
    """
    if setting.device not in constants.devices:
        raise OptionError(f"--device {setting.device} was not measured: use {', '.join(sorted(constants.devices))}")
    device = constants.devices[setting.device]
    if device.cores is None and setting.worker_cores is not None:
        raise OptionError(
            f"--worker-cores is for workers that are processors, and {setting.device} is none: leave it out"
        )
    most = device.memory if setting.worker_memory is None else setting.worker_memory
    every = list(choices)
    fitting = [team for team in every if most is None or memory(setting, team).worker <= most]
    if not fitting:
        least = min(memory(setting, team).worker for team in every)
        raise OptionError(
            f"a worker holds {size_text(least)} at least, and has {size_text(most or 0)}: take more workers, or say "
            "more columns or sets of layers"
        )
    model = min(
        (Model(constants, setting, team) for team in fitting),
        key=lambda one: (one.decode().total, one.prefill().total, one.team.columns),
    )
    return found(model)


def found(model: Model) -> dict[str, Any]:
    """What a team gives. Rates are tokens a second; of decode they are those of all sequences together.

    Raises OptionError where something takes no time at all by the constants.
    """
    constants, setting, team = model.constants, model.setting, model.team
    step, prompt = model.decode(), model.prefill()
    prompt_s = model.prefill_s()
    tee_prompt_s, tee_step_s = in_tee(constants, setting)
    pads = prompt_pads = PadTimes(0.0)
    if setting.mode == "masked":
        pads, prompt_pads = pad_times(constants, setting), pad_times(constants, setting, setting.prompt)
    made = pads.by_themselves or setting.mode != "masked"
    if not (made and step.total and prompt_s and tee_step_s and tee_prompt_s):
        raise OptionError("--constants: with these figures something takes no time: run tsqp bench constants again")
    token_s = step.total / setting.batch
    lasting_s, lasting_prompt_s = pads.lasting(token_s), prompt_pads.lasting(prompt_s)
    link, held = setting.link, memory(setting, team)
    return {
        "mode": setting.mode,
        "team": {**asdict(team), "workers": team.workers},
        "device": setting.device,
        "device_source": model.device.source,
        "worker_cores": setting.worker_cores or model.device.cores,
        "link": {"transport": link.transport, **_link(link)},
        "trusted_cores": setting.cores,
        "batch": setting.batch,
        "prompt": setting.prompt,
        "dealers": setting.dealers,
        "decode": {
            "tokens_per_s": 1 / token_s,
            "lasting_tokens_per_s": 1 / lasting_s,
            "in_tee_tokens_per_s": setting.batch / tee_step_s,
            "gain": tee_step_s / setting.batch / token_s,
            "lasting_gain": tee_step_s / setting.batch / lasting_s,
            "step_s": step.total,
            "largest": step.largest,
            "lasting_largest": "pads" if pads.bind(token_s) else step.largest,
            "parts_s": asdict(step),
        },
        "prefill": {
            "tokens_per_s": setting.prompt / prompt_s,
            "lasting_tokens_per_s": setting.prompt / lasting_prompt_s,
            "in_tee_tokens_per_s": setting.prompt / tee_prompt_s,
            "gain": tee_prompt_s / prompt_s,
            "lasting_gain": tee_prompt_s / lasting_prompt_s,
            "prompt_s": prompt_s,
            "largest": prompt.largest,
            "lasting_largest": "pads" if prompt_pads.bind(prompt_s) else prompt.largest,
            "parts_s": asdict(prompt),
        },
        "pads": _pads(setting, pads.by_themselves),
        "memory_bytes": {**asdict(held), "trusted": held.trusted},
    }


def _link(link: Link) -> dict[str, Any]:
    return {"bytes_per_s": link.rate, "rtt_s": link.rtt_s, "loss": link.loss, "plain": link.plain}


def _pads(setting: Setting, pad_s: float) -> dict[str, Any] | None:
    """How fast pads come, what of them is kept, and what dealers send of them; None where there are none.

    ``ready``: how many are ready before a step and before a prompt, and their bytes.
    """
    if setting.mode != "masked":
        return None
    kept = 4 * numbers_of(setting.config)[1]
    ready = sorted({ready_tokens(rows) for rows in (setting.batch, setting.prompt)})
    return {
        "tokens_per_s": 1 / pad_s,
        "bytes_per_token": kept,
        "made_bytes_per_s": kept / pad_s,
        "ready": [{"tokens": tokens, "bytes": pad_bytes(setting.config, tokens)} for tokens in ready],
        "makers": counted(setting.dealers, "dealer") if setting.dealers else "trusted side",
    }


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The same for a person."""
    team, link, held = plan["team"], plan["link"], plan["memory_bytes"]
    way = "shm" if link["bytes_per_s"] is None else f"{rate_text(link['bytes_per_s'])}, {seconds_text(link['rtt_s'])}"
    way += (f", {link['loss']:.3g} of packets lost" if link["loss"] else "") + (", no keys" if link["plain"] else "")
    cores = "" if plan["worker_cores"] is None else f", {counted(plan['worker_cores'], 'core')} each"
    divided = (
        counted(team["columns"], "column"),
        counted(team["layers"], "set of layers", "sets of layers"),
        counted(team["replicas"], "replica"),
    )
    yield (
        f"{plan['mode']}, {counted(team['workers'], 'worker')} ({plan['device']}{cores}): {', '.join(divided)}; link "
        f"{way}; {counted(plan['trusted_cores'], 'trusted core')}"
    )
    yield ""
    yield f"{'tokens a second':34}{'pads ready':>12}{'lasting':>12}{'all in TEE':>12}{'gain':>8}{'lasting':>9}"
    for name, what in (("decode", f"decode, batch {plan['batch']}"), ("prefill", f"prefill, {plan['prompt']} tokens")):
        one = plan[name]
        rates = (one["tokens_per_s"], one["lasting_tokens_per_s"], one["in_tee_tokens_per_s"])
        gains = f"{one['gain']:>8.2f}{one['lasting_gain']:>9.2f}"
        yield f"{what:34}" + "".join(f"{_rate(rate):>12}" for rate in rates) + gains
    yield ""
    for name in ("decode", "prefill"):
        yield from _parts(name, plan[name])
    if plan["pads"] is not None:
        pads = plan["pads"]
        rate, size = _rate(pads["tokens_per_s"]), size_text(pads["bytes_per_token"])
        yield f"pads by {pads['makers']}: those of {rate} tokens of answers a second, {size} for each"
        for one in pads["ready"]:
            yield from _pad_flags(one["tokens"], one["bytes"])
    yield f"a worker holds {size_text(held['worker'])} of weights"
    yield (
        f"the trusted side holds {size_text(held['trusted'])}: embedding {size_text(held['embedding'])}, weights "
        f"{size_text(held['weights'])}, check vectors {size_text(held['vectors'])}, keys and values "
        f"{size_text(held['kv'])}, pads {size_text(held['pads'])}"
    )
    yield f"the device's figures: {plan['device_source']}"


def _parts(name: str, one: dict[str, Any]) -> Iterator[str]:
    whole = Parts(**one["parts_s"]).total
    shares = [(key.replace("_", " "), seconds / whole) for key, seconds in one["parts_s"].items()]
    shares.sort(key=lambda share: -share[1])
    yield f"{name}: most of it is {WORDS[one['largest']]}"
    if one["lasting_largest"] == "pads":
        yield "  and once pads run out, making pads"
    yield "  " + ", ".join(f"{key} {share:.0%}" for key, share in shares if share > 0.005)


def _pad_flags(tokens: int, size: int) -> Iterator[str]:
    """What a run has to be told, so that it keeps the pads of so many tokens ready; nothing where it does so anyway."""
    flags = [f"--pads-ahead {tokens}"] if tokens > PADS_AHEAD else []
    flags += [f"--pad-memory {ceil(size / 1e6)}MB"] if size > PAD_MEMORY else []
    if flags:
        yield f"pads of {tokens} tokens are ready where a run has {' '.join(flags)}"


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
