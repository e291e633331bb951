"""What the results say in each README's language, by the same names and with the same fields.

A text is a format string: ``benchmarks.readme`` fills in the figures.
"""

from __future__ import annotations

from collections.abc import Mapping

Words = Mapping[str, str]

ENGLISH: Words = {
    "Llama-3.2-1B shape": "Llama-3.2-1B shape",
    "SmolLM2-135M": "SmolLM2-135M",
    "prefill": "prefill",
    "decode": "decode, a token",
    "open, bfloat16": "open, bfloat16",
    "verified": "verified",
    "masked, pads ready": "masked, pads ready",
    "masked, pads drained": "masked, pads drained",
    "masked, pads by a dealer": "masked, pads by a dealer",
    "setting": (
        "`{partition}` over `{transport}`, {dtype}, {tokens}-token prompt, {cpu} shared by both sides; medians of "
        "{runs} runs, in alternation with {peer} (torch {torch}, commit {commit}). At `open`, which hides nothing: "
        "what the split itself costs."
    ),
    "split columns": "| | TSQP | transformers | ratio | limit |",
    "startup": "| `tsqp generate`, start to first token{mode} | {warm:.1f} s warm, {cold:.1f} s cold | | | |",
    "origin": (
        "Against the configuration this project began with, on the same machine (`tsqp bench origin`): "
        "{origin[seconds]:.1f} s for a {tokens}-token prefill in {origin[calls]} calls that move {moved:.1f} GiB, now "
        "{best[seconds]:.2f} s in {best[calls]} calls: **{speedup:.0f}×** ({speedup_float32:.1f}× in float32)."
    ),
    "private": (
        "What protection costs, {model}, {tokens}-token prompt, in alternation (`tsqp bench private`, commit {commit}):"
    ),
    "private columns": "| | prefill | ratio to `open` | decode, a token | ratio |",
    "offload": (
        "What the split saves the trusted side (`tsqp bench offload`, {cpu}, medians of {runs} runs, commit {commit}): "
        "the whole model there, over what `masked` leaves there with pads ready and the worker's kernels not counted. "
        "[docs/offload.md](docs/offload.md) has the formula for other machines."
    ),
    "offload columns": (
        "| | whole, bfloat16 | whole, int8 | llama.cpp, Q8_0 | left | gain, bfloat16 | gain, int8 | gain with pads | "
        "limit of left |"
    ),
    "offload prefill": "{model}, prefill of {tokens}",
    "offload decode": "{model}, decode after {context}",
    "offload decodes": "{model}, decode of {sequences} after {context} each",
    "Llama-3.1-8B shape": "Llama-3.1-8B shape",
    "empty pool": (
        "An answer of {steps} tokens from an empty pool, which is filled meanwhile: {milliseconds:.0f} ms a token, "
        "**{ratio:.2f}** of `open`."
    ),
    "masked": "masked, pads ready",
    "open": "open, bfloat16",
    "server": (
        "As a server: so many clients at once, each with prompts of {tokens} tokens and answers of {answers}; tokens a "
        "second of all together (`tsqp bench load`, SmolLM2-135M, one run, the client on the same cores, commit "
        "{commit}; [plot](docs/plots/load-default.png)):"
    ),
    "clients": "clients",
    "first token": "first token, 95 of 100, of the last column",
    "sharing": (
        "Over HTTP a token of a single answer takes {http[open][ratio]:.2f} (`open`) and {http[masked][ratio]:.2f} "
        "(`masked`) of what it takes in the library. While a prompt of {long} tokens comes in, 95 of 100 gaps between "
        "tokens of four running answers are at most {gaps[open][ratio]:.1f} and {gaps[masked][ratio]:.1f} times as "
        "long as before; the second turn of a conversation of {turn} tokens has its first token after "
        "{turns[open][ratio]:.2f} and {turns[masked][ratio]:.2f} of the first turn's time (`tsqp bench serve`, commit "
        "{commit})."
    ),
    "quality": "Quality, perplexity of {tokens} tokens of prose, {model} (`python -m benchmarks.quality`):",
    "int8": (
        "`--dtype int8` decodes a token of the 1B shape in {milliseconds:.0f} ms, **{ratio:.2f}** of our own bfloat16 "
        "in the same run."
    ),
    "transport": (
        "`{transport}` {p50_us:.0f} µs (99th percentile {p99_us:.0f} µs; {size:.0f} MiB there and back "
        "{milliseconds:.1f} ms, {ratio:.1f}× two local copies)"
    ),
    "transports": "A null call, there and back: {each}.",
    "between transports": "; ",
}

CHINESE: Words = {
    "Llama-3.2-1B shape": "Llama-3.2-1B 形状",
    "SmolLM2-135M": "SmolLM2-135M",
    "prefill": "prefill",
    "decode": "decode（每 token）",
    "open, bfloat16": "open，bfloat16",
    "verified": "verified",
    "masked, pads ready": "masked，pad 已备好",
    "masked, pads drained": "masked，pad 池为空",
    "masked, pads by a dealer": "masked，pad 由 dealer 提供",
    "setting": (
        "`{partition}` 划分，`{transport}` 传输，{dtype}，{tokens} token 的 prompt，双方共用 {cpu}；"
        "与 {peer} 交替运行 {runs} 次取中位数（torch {torch}，commit {commit}）。"
        "模式为 `open`，不隐藏任何数据：表中是拆分本身的开销。"
    ),
    "split columns": "| | TSQP | transformers | 比值 | 极限 |",
    "startup": "| `tsqp generate` 从启动到首个 token{mode} | 热启动 {warm:.1f} s，冷启动 {cold:.1f} s | | | |",
    "origin": (
        "与本项目最初的配置在同一台机器上相比（`tsqp bench origin`）：最初 {tokens} token 的 prefill 需要 "
        "{origin[seconds]:.1f} s，{origin[calls]} 次调用，传输 {moved:.1f} GiB；现在需要 {best[seconds]:.2f} s，"
        "{best[calls]} 次调用：**{speedup:.0f}×**（float32 下为 {speedup_float32:.1f}×）。"
    ),
    "private": (
        "保护的代价：{model}，{tokens} token 的 prompt，各模式交替运行（`tsqp bench private`，commit {commit}）："
    ),
    "private columns": "| | prefill | 与 `open` 之比 | decode（每 token） | 比值 |",
    "offload": (
        "拆分为可信一侧省下多少（`tsqp bench offload`，{cpu}，{runs} 次的中位数，commit {commit}）："
        "整个模型都在可信一侧运行的时间，除以 `masked` 在 pad 已备好时留在可信一侧的时间"
        "（不计 worker 的 kernel 时间）。"
        "其他机器的计算公式见 [docs/offload.md](docs/offload.md)。"
    ),
    "offload columns": (
        "| | 整个模型，bfloat16 | 整个模型，int8 | llama.cpp，Q8_0 | 留在可信一侧 | 增益，bfloat16 | 增益，int8 | "
        "计入 pad 的增益 | 下限 |"
    ),
    "offload prefill": "{model}，{tokens} token 的 prefill",
    "offload decode": "{model}，{context} token 之后的 decode",
    "offload decodes": "{model}，{sequences} 个序列、各 {context} token 之后的 decode",
    "Llama-3.1-8B shape": "Llama-3.1-8B 形状",
    "empty pool": (
        "pad 池起初为空、边生成边补充时，生成 {steps} 个 token 的回答：每 token {milliseconds:.0f} ms，"
        "为 `open` 的 **{ratio:.2f}**。"
    ),
    "masked": "masked，pad 已备好",
    "open": "open，bfloat16",
    "server": (
        "作为服务器：若干客户端同时请求，每个 prompt {tokens} token、回答 {answers} token；表中为全体每秒 token 数"
        "（`tsqp bench load`，SmolLM2-135M，单次运行，客户端占用同样的核，commit {commit}；"
        "[图](docs/plots/load-default.png)）："
    ),
    "clients": "客户端数",
    "first token": "最后一列的首 token，100 次中 95 次不超过",
    "sharing": (
        "单个回答经 HTTP 时，每 token 时间为直接用库时的 {http[open][ratio]:.2f}（`open`）与 "
        "{http[masked][ratio]:.2f}（`masked`）。{long} token 的 prompt 进入期间，四个进行中的回答的 token 间隔"
        "（100 个中 95 个不超过）为平时的 {gaps[open][ratio]:.1f} 与 {gaps[masked][ratio]:.1f} 倍；"
        "{turn} token 的对话，第二轮的首 token 时间为第一轮的 {turns[open][ratio]:.2f} 与 {turns[masked][ratio]:.2f}"
        "（`tsqp bench serve`，commit {commit}）。"
    ),
    "quality": "质量：{tokens} token 英文文章的 perplexity，{model}（`python -m benchmarks.quality`）：",
    "int8": (
        "`--dtype int8` 在 1B 形状上 decode 每 token 需要 {milliseconds:.0f} ms，"
        "为同次测量中 bfloat16 的 **{ratio:.2f}**。"
    ),
    "transport": (
        "`{transport}` {p50_us:.0f} µs（第 99 百分位 {p99_us:.0f} µs；"
        "{size:.0f} MiB 往返 {milliseconds:.1f} ms，为两次本地拷贝的 {ratio:.1f}×）"
    ),
    "transports": "一次空调用的往返时间：{each}。",
    "between transports": "；",
}
