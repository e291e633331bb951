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
    "startup": (
        "| `tsqp generate`, start to first token{mode}, loops compiled before | {warm:.1f} s, with nothing of it in "
        "memory {cold:.1f} s | | | |"
    ),
    "origin": (
        "Against the configuration this project began with, on the same machine (`tsqp bench origin`): "
        "{origin[seconds]:.1f} s for a {tokens}-token prefill in {origin[calls]} calls that move {moved:.1f} GiB, now "
        "{best[seconds]:.2f} s in {best[calls]} calls: **{speedup:.1f}×** ({speedup_float32:.1f}× in float32)."
    ),
    "private": (
        "What protection costs, {model}, {tokens}-token prompt, in alternation (`tsqp bench private`, commit {commit}):"
    ),
    "private columns": "| | prefill | ratio to `open` | decode, a token | ratio |",
    "offload": (
        "What the split saves the trusted side (`tsqp bench offload`, {cpu}, medians of {runs} runs, commit {commit}). "
        "*Whole*: the time of the whole model there. *Left*: the time of a `masked` pass with pads ready, less the "
        "worker's kernels. *Gain*: whole over left; below 1 the split loses. *Gain with pads* counts the pads too, "
        "made by the trusted side itself. [docs/offload.md](docs/offload.md) has longer prompts, many sequences, and "
        "the formula for other machines."
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
        "second of all together (`tsqp bench load`, SmolLM2-135M with `--kv-dtype bfloat16`, one run, the client "
        "on the same cores, commit "
        "{commit}; [plot](docs/plots/load-default.png)):"
    ),
    "clients": "clients",
    "first token": "first token at {most} clients, 95th percentile",
    "sharing": (
        "Over HTTP a token of a single answer takes {http[open][ratio]:.2f} (`open`) and {http[masked][ratio]:.2f} "
        "(`masked`) of what it takes in the library. While a prompt of {long} tokens is read, the gaps between tokens "
        "of four running answers grow: their 95th percentile is {gaps[open][ratio]:.1f} (`open`) and "
        "{gaps[masked][ratio]:.1f} (`masked`) times as long as before. The second turn of a conversation of {turn} "
        "tokens has its first token in {turns[open][ratio]:.2f} and {turns[masked][ratio]:.2f} of the first turn's "
        "time (`tsqp bench serve`, commit {commit})."
    ),
    "peers": (
        "llama.cpp gives one client {one:.1f} times the tokens of `masked`. Its prebuilt package uses AVX2 alone: "
        "built for this processor it may be faster, most of all in prefill. `masked` keeps its rate while pads last; "
        "then it gives no more tokens, prompts included, than pads are made: {made:.0f} a second in idle time."
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
    "startup": (
        "| `tsqp generate` 从启动到首个 token{mode}，循环已编译 | {warm:.1f} s；"
        "内存中没有任何缓存时 {cold:.1f} s | | | |"
    ),
    "origin": (
        "与本项目最初的配置在同一台机器上相比（`tsqp bench origin`）：最初 {tokens} token 的 prefill 需要 "
        "{origin[seconds]:.1f} s，{origin[calls]} 次调用，传输 {moved:.1f} GiB；现在需要 {best[seconds]:.2f} s，"
        "{best[calls]} 次调用：**{speedup:.1f}×**（float32 下为 {speedup_float32:.1f}×）。"
    ),
    "private": (
        "保护的代价：{model}，{tokens} token 的 prompt，各模式交替运行（`tsqp bench private`，commit {commit}）："
    ),
    "private columns": "| | prefill | 与 `open` 之比 | decode（每 token） | 比值 |",
    "offload": (
        "拆分为可信一侧省下多少（`tsqp bench offload`，{cpu}，{runs} 次的中位数，commit {commit}）。"
        "*整个模型*：整个模型都在可信一侧运行的时间。*留在可信一侧*：pad 已备好时 `masked` 一次运行的时间，"
        "不计 worker 的 kernel 时间。*增益*：前者除以后者；低于 1 时拆分不划算。"
        "*计入 pad 的增益*：再计入由可信一侧自己生成 pad 的时间。"
        "更长的 prompt、多个序列以及其他机器的计算公式见 [docs/offload.md](docs/offload.md)。"
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
        "（`tsqp bench load`，SmolLM2-135M（`--kv-dtype bfloat16`），单次运行，客户端占用同样的核，commit {commit}；"
        "[图](docs/plots/load-default.png)）："
    ),
    "clients": "客户端数",
    "first token": "{most} 个客户端时的首 token，第 95 百分位",
    "sharing": (
        "单个回答经 HTTP 时，每 token 时间为直接用库时的 {http[open][ratio]:.2f}（`open`）与 "
        "{http[masked][ratio]:.2f}（`masked`）。读入 {long} token 的 prompt 期间，四个进行中的回答的 token 间隔变长："
        "第 95 百分位为平时的 {gaps[open][ratio]:.1f} 倍（`open`）与 {gaps[masked][ratio]:.1f} 倍（`masked`）。"
        "{turn} token 的对话，第二轮的首 token 时间为第一轮的 {turns[open][ratio]:.2f} 与 {turns[masked][ratio]:.2f}"
        "（`tsqp bench serve`，commit {commit}）。"
    ),
    "peers": (
        "只有一个客户端时，llama.cpp 每秒的 token 数为 `masked` 的 {one:.1f} 倍。它的预编译包只用 AVX2："
        "为本机处理器编译可能更快，prefill 尤其如此。`masked` 在 pad 用完之前保持上面的速度；"
        "之后，连同 prompt 在内，每秒的 token 数不会超过生成 pad 的速度：空闲时每秒 {made:.0f} 个。"
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
