"""Makes docs/performance.md and its plots from the rows in bench/results: python -m bench.performance

Shown is the newest row of each op, shape, dtype, GPU and provider, but for kernels that csrc no longer has. A peer's row is
set beside the row of ours that the same run wrote before it. What has no rows is left out. A test compares the committed
page's numbers with those of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.gate import load, newest, our_providers
from bench.sources import ROOT

GIB = 2**30
NAMES = {
    "smollm2-135m": "SmolLM2-135M",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen3-8b": "Qwen3-8B",
    "llama-3.3-70b": "Llama-3.3-70B",
}
PEER, MAIN = "specforge", "llama-3.1-8b"
BLOCK_METHODS = {"dflash": "DFlash", "dspark": "DSpark", "dflash2": "DFlash2"}
BLOCK_PEERS = ("specforge", "speculators")
HEAD = """# Performance

This page shows the newest row of each measurement: the training step beside SpecForge's, its memory, and each kernel
under the hardware's limit. [speed.md](speed.md) explains the numbers. The page is made from the rows in
[bench/results](../bench/results) by `python -m bench.performance`; change the rows, not this page.
"""


def read(results: Path) -> list[dict]:
    rows = [row for path in sorted(results.glob("*.jsonl")) for row in load(path) if "op" in row and "provider" in row]
    return [row for row in rows if row["provider"] != "cuda" or "cuda" in our_providers(row["op"])]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(x: float | None, digits: int = 1) -> str:
    return "" if x is None else f"{x:,.{digits}f}"


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def failed(row: dict) -> str:
    return "out of memory" if "memory" in row["failed"] else row["failed"]


# --- the step ------------------------------------------------------------------------------------------------------------


class Steps:
    """One GPU's step rows in bf16 and fp8: the newest of ours by (model, pattern, tokens), pairs of ours and a peer's."""

    def __init__(self, rows: list[dict], gpu: str):
        mine = [r for r in rows if r["op"] == "step" and r["gpu"] == gpu and r["dtype"] != "fp32" and r["shape"]["T"] == 7]
        mine = [r for r in mine if "chunk_rows" not in r["shape"]]
        self.ours: dict[tuple[str, str, int], dict] = {}
        self.variants: dict[str, dict[tuple[str, str, int], dict]] = {}  # ours with flash-attn 4 installed, and in fp8
        self.pairs: dict[tuple[str, str, int], tuple[dict, dict]] = {}  # ours of the same run, the peer's fastest
        peers: dict[tuple[str, str, int], dict[str, tuple[dict, dict]]] = {}
        for row in mine:
            place = (row["shape"]["model"], row["shape"]["pattern"], row["shape"]["tokens"])
            if row["provider"] == "fastdraft":
                self.ours[place] = row
            elif row["provider"].startswith("fastdraft, "):
                self.variants.setdefault(row["provider"].removeprefix("fastdraft, "), {})[place] = row
            elif row["provider"].startswith(PEER) and place in self.ours:
                peers.setdefault(place, {})[row["provider"]] = (self.ours[place], row)
        for place, found in peers.items():
            self.pairs[place] = min(found.values(), key=lambda pair: pair[1].get("us_per_token", float("inf")))

    def ratio(self, place: tuple[str, str, int], field: str = "us_per_token") -> float | None:
        """How many times the peer's time ours is less, both in one run."""
        if place not in self.pairs or any("failed" in row for row in self.pairs[place]):
            return None
        ours, peer = self.pairs[place]
        return peer[field] / ours[field]

    def of(self, pattern: str) -> list[tuple[tuple[str, str, int], dict]]:
        order = list(NAMES)
        known = [(place, row) for place, row in self.ours.items() if place[1] == pattern and place[0] in NAMES]
        return sorted(known, key=lambda item: (order.index(item[0][0]), item[0][2]))

    def live(self) -> str:
        lines = []
        for place, row in self.of("live"):
            line = [NAMES[place[0]], short(place[2])]
            if "failed" in row:
                lines.append([*line, failed(row), *[""] * (6 + len(self.variants))])
                continue
            peer = self.pairs[place][1] if place in self.pairs else None
            theirs = "" if peer is None else failed(peer) if "failed" in peer else number(peer["us_per_token"])
            ratio = self.ratio(place)
            spread = f"{number(row['us_per_token'])} ({number(row['p20'])}-{number(row['p80'])})"
            mfu = "" if row["mfu"] is None else number(100 * row["mfu"])
            gemm = [number(row.get(field)) for field in ("pct_of_gemm", "pct_of_sustained_gemm")]
            line += [spread, number(row["model_us_per_token"]), mfu, *gemm]
            line += [number(rows.get(place, {}).get("us_per_token")) for rows in self.variants.values()]
            lines.append([*line, theirs, "" if ratio is None else f"{ratio:.2f}"])
        header = ["draft", "tokens", "us/token", "no optimizer", "MFU %", "% of GEMM", "lasting", *self.variants]
        return table([*header, "SpecForge us/token", "times faster"], lines) if lines else ""

    def chats(self) -> str:
        lines = []
        for place, row in self.of("chats"):
            if "failed" in row:
                continue
            line = [NAMES[place[0]], short(place[2])]
            line += [number(row[f], 0) for f in ("useful_tokens_per_s", "tokens_per_s")]
            line.append("" if row["mfu"] is None else number(100 * row["mfu"]))
            if place in self.pairs and "failed" not in self.pairs[place][1]:
                peer = self.pairs[place][1]
                line += [number(peer["useful_tokens_per_s"], 0), peer["provider"].partition(", ")[2]]
                line.append(f"{self.ratio(place):.2f}")
            else:
                line += ["", "", ""]
            lines.append(line)
        header = ["draft", "pack", "useful tokens/s", "tokens/s", "MFU %", "SpecForge useful tokens/s", "", "times faster"]
        return table(header, lines) if lines else ""

    def memory(self) -> str:
        lines = []
        parts = ("weights_optimizer", "inputs", "per_token", "transient", "peak")
        for place, row in [*self.of("live"), *self.of("tail")]:
            if "memory" not in row:
                continue
            trained = short(place[2]) + (", the last 8k trained on" if place[1] == "tail" else "")
            peer = self.pairs[place][1] if place in self.pairs else {}
            theirs = [number(peer["memory"][p] / GIB) for p in ("transient", "peak")] if "memory" in peer else ["", ""]
            if "failed" in peer:
                theirs = ["", failed(peer)]
            lines.append([NAMES[place[0]], trained, *(number(row["memory"][p] / GIB) for p in parts), *theirs])
        header = ["draft, GiB", "tokens", "weights, optimizer, head", "g and f", "kept per token", "transient", "peak"]
        return table([*header, "SpecForge transient", "its peak"], lines) if lines else ""

    def launches(self) -> str:
        lines = []
        for place, row in self.of("live"):
            if row.get("kernels") is None:
                continue
            first = f"{number(row['first_step_s'])} ({row['first_step']})"
            peer = self.pairs[place][1] if place in self.pairs else {}
            theirs = [str(peer[f]) if peer.get(f) is not None else "" for f in ("first_step_s", "kernels", "syncs")]
            lines.append([NAMES[place[0]], short(place[2]), first, str(row["kernels"]), str(row["syncs"]), *theirs])
        header = ["draft", "tokens", "first step s", "kernels", "host syncs", "SpecForge first step s", "kernels", "syncs"]
        return table(header, lines) if lines else ""

    def goals(self) -> str:
        """The project's goals for Llama-3.1-8B's draft, and what the rows say of each."""
        place = lambda tokens, pattern="live": (MAIN, pattern, tokens)  # noqa: E731
        found: list[tuple[str, str]] = []
        for tokens, times in ((2048, 1.7), (4096, 1.5), (8192, 1.4)):
            ratio = self.ratio(place(tokens), "model_us_per_token")
            if ratio is not None:
                found.append((f"{times} times SpecForge at {short(tokens)}, forward and backward", f"{ratio:.2f}"))
        ratio = self.ratio(place(8192, "chats"), "us_per_token")
        if ratio is not None:
            found.append(("2.2 times its useful tokens/s on real chats", f"{ratio:.2f}"))
        mfu = {n: self.ours[place(n)] for n in (2048, 4096, 8192) if self.ours.get(place(n), {}).get("mfu")}
        if mfu:
            reached = ", ".join(f"{100 * row['mfu']:.1f} % at {short(n)}" for n, row in mfu.items())
            lasting = [row["mfu"] / row["pct_of_sustained_gemm"] for row in mfu.values() if "pct_of_sustained_gemm" in row]
            more = f"; 8192^3 products reach {1e4 * lasting[-1]:.0f} % in their second second" if lasting else ""
            found.append(("65 % MFU", reached + more))
        at = {n: self.ours[place(n)] for n in (8192, 131072) if "memory" in self.ours.get(place(n), {})}
        if 8192 in at:
            memory = at[8192]["memory"]
            transient = (memory["per_token"] + memory["transient_model"]) / GIB
            found.append(("at most 4 GiB above weights and inputs at 8k, forward and backward", f"{transient:.1f} GiB"))
        if 131072 in at:
            found.append(("128k tokens in 40 GB", f"{at[131072]['memory']['peak'] / 1e9:.1f} GB"))
        longest = self.ours.get(place(524288, "tail"), {})
        if "memory" in longest:
            found.append(("512k tokens in 80 GB", f"{longest['memory']['peak'] / 1e9:.1f} GB, the last 8k trained on"))
        cold = [
            row["first_step_s"]
            for (model, *_), row in self.ours.items()
            if model == MAIN and row.get("first_step") == "cold"
        ]
        if cold:
            found.append(("first step in 20 s with empty caches", f"{max(cold):.1f} s"))
        return table(["goal", "reached"], [list(line) for line in found]) if found else ""


class Blocks:
    """One GPU's rows of `block_step` in bf16: the newest of ours by shape, and of each peer with ours of the same run."""

    def __init__(self, rows: list[dict], gpu: str):
        self.ours: dict[str, dict] = {}  # by shape
        self.peers: dict[tuple[str, str], tuple[dict, dict]] = {}  # by shape and peer: ours, theirs
        for row in rows:
            if row["op"] != "block_step" or row["gpu"] != gpu or row["dtype"] != "bf16" or "chunk_blocks" in row["shape"]:
                continue
            place, name = json.dumps(row["shape"], sort_keys=True), row["provider"]
            if name == "fastdraft":
                self.ours[place] = row
            elif place in self.ours and name.startswith(BLOCK_PEERS):
                self.peers[place, name.partition(",")[0]] = self.ours[place], row

    def shapes(self) -> list[tuple[str, list[str]]]:
        """Places in the page's order, and how a line begins."""
        found = []
        for place in self.ours:
            shape = json.loads(place)
            if shape["model"] in NAMES:
                pattern = shape["pattern"] + (f", {shape['loss']}" if "loss" in shape else "")
                method = BLOCK_METHODS[shape.get("method", "dflash")]
                model = list(NAMES).index(shape["model"]), list(BLOCK_METHODS.values()).index(method)
                key = *model, -shape["B"], shape["pattern"] != "live", shape["tokens"]
                line = [f"{method} of {NAMES[shape['model']]}, B {shape['B']}", f"{short(shape['tokens'])} {pattern}"]
                found.append((key, place, line))
        return [(place, line) for _, place, line in sorted(found)]

    def ratio(self, place: str, peer: str, field: str = "us_per_row") -> float | None:
        """How many times the peer's time ours is less, both in one run."""
        if (place, peer) not in self.peers or any("failed" in row for row in self.peers[place, peer]):
            return None
        ours, theirs = self.peers[place, peer]
        return theirs[field] / ours[field]

    def beside(self, place: str, peer: str, value: Callable[[dict], str]) -> str:
        if (place, peer) not in self.peers:
            return ""
        row = self.peers[place, peer][1]
        return failed(row) if "failed" in row else value(row)

    def block_time(self) -> str:
        lines = []
        for place, line in self.shapes():
            row = self.ours[place]
            spread = f"{number(row['us_per_row'])} ({number(row['p20'])}-{number(row['p80'])})"
            line += [spread, number(row["model_us_per_row"]), number(row["model_us_per_trained_token"])]
            line += ["" if row["mfu"] is None else number(100 * row["mfu"]), number(row.get("pct_of_sustained_gemm"))]
            for peer in BLOCK_PEERS:
                ratios = [self.ratio(place, peer, field) for field in ("us_per_row", "model_us_per_row")]
                times = "" if ratios[0] is None else " / ".join(f"{ratio:.2f}" for ratio in ratios)
                line += [self.beside(place, peer, lambda r: number(r["us_per_row"])), times]
            lines.append(line)
        header = ["draft", "tokens", "us/row", "no optimizer", "by trained token", "MFU %", "lasting"]
        for peer in BLOCK_PEERS:
            header += [f"{peer} us/row", "times faster"]
        return table(header, lines) if lines else ""

    def block_memory(self) -> str:
        lines = []
        for place, line in self.shapes():
            row = self.ours[place]
            memory = row["memory"]
            line += [number(memory[part] / GIB) for part in ("weights_optimizer", "per_token", "transient", "peak")]
            line += [f"{number(row['first_step_s'])} ({row['first_step']})", str(row["kernels"]), str(row["syncs"])]
            for peer in BLOCK_PEERS:
                line.append(self.beside(place, peer, lambda r: number(r["memory"]["transient"] / GIB)))
                line.append(
                    self.beside(place, peer, lambda r: f"{number(r['first_step_s'])}, {r['kernels']}, {r['syncs']}")
                )
            lines.append(line)
        header = ["draft, GiB", "tokens", "weights, optimizer, head", "kept per token", "transient", "peak"]
        header += ["first step s", "kernels", "host syncs"]
        for peer in BLOCK_PEERS:
            header += [f"{peer} transient", "first step s, kernels, syncs"]
        return table(header, lines) if lines else ""


STEP_TEXT = {
    "goals": "These are the project's goals for the draft of Llama-3.1-8B, and what the rows below say of each.",
    "live": """Every token is trained on, the pack is one document, T is 7, and the dtype is bf16. Times are medians,
with the 20th and 80th percentile in brackets.

- `us/token` is the time of the whole step, and `no optimizer` that of forward and backward alone.
- `times faster` is of the newest run that timed both sides; ours may have been timed alone since.
- `MFU` is the share of the data sheet's dense bf16 rate. It counts the FLOPs that the published algorithm needs
  (`bench.work.model_flops`), among them the 5 % that sharing QKV's embedding half saves.
- `% of GEMM` is the share of the rate that an 8192^3 product reached in the same process. `lasting` is the share of
  the rate that such products keep after a second of nothing else, at the clock that the GPU's power then allows.
- `fp8` and `flash-attn` are our us/token with `precision: fp8`, and with FlashAttention 4 installed.
- SpecForge ran in the same process, in turns with ours, on the same weights and inputs, with its own optimizer.""",
    "chats": """Our step takes real chats packed. SpecForge takes them one at a time or as a padded batch, because its
EAGLE-3 trainer has no packing (`bench/peers/specforge.py`). Useful tokens are those whose step-0 row is trained on.""",
    "memory": """A step's peak is divided by what holds it. SpecForge's gradient is in bf16 and lives within the step,
so it counts as transient there; ours counts with the optimizer.""",
    "launches": """The first step compiles. It is `cold` in a new process with empty caches, `warm` in a new
process, and `later` where the same process has run another length before.""",
    "block_time": """DFlash and DFlash2 with hard labels, DSpark with its three terms, at most 512 anchors a document, bf16.
`live` is one document of which every token is trained on; `chats` are packed conversations.

- `us/row` is the time of the whole step by block row, B of them for each anchor; its percentiles are in brackets.
  `no optimizer` is forward and backward alone, `by trained token` the same by rows that have a label.
- `MFU` counts only products that are needed (`bench.block_work.flop_parts`), `lasting` is as above.
- `times faster` is of the whole step / without the optimizer, of the newest run that timed both sides: in one process, in
  turns, on the same weights, inputs and anchors. The peer's us/row is of that run; ours may have been timed alone since,
  so that the two need not divide to the ratio. SpecForge pads conversations, four a batch; speculators computes a
  teacher too, as its trainer does for this loss. The program that writes a peer's row fails where its loss is not ours
  to 1 %.""",
    "block_memory": """What the step holds above weights and inputs, beside the peers' transient memory; the numbers
behind it are their first step's seconds, kernels and host synchronisations in a step. The peers' numbers are of the newest
run with ours in one process; ours may have been measured alone since.""",
}
KERNEL_TEXT = """Times are medians, in bf16 where nothing else is said. The roof of a row is the larger of two times:
its FLOPs over the GPU's matrix rate, and its bytes over its copy rate, both measured in the same process. Our kernel
is Triton's; `cuda` beside it is the same kernel in csrc/, which is used where it is built.
"""
TITLES = {
    "goals": "Goals",
    "live": "Time",
    "chats": "Real chats",
    "memory": "Memory",
    "launches": "First step and launches",
}
BLOCK_TITLES = {"block_time": "Blocks: time", "block_memory": "Blocks: memory, first step and launches"}


# --- kernels -------------------------------------------------------------------------------------------------------------


def kernels(rows: list[dict], gpu: str) -> str:
    """A table of the newest rows, the other providers of a row beside ours."""
    last = {k: found[-1] for k, found in newest([r for r in rows if "pct_of_roof" in r and r["gpu"] == gpu]).items()}
    lines = []
    for (op, shape, dtype, _, provider), row in sorted(last.items()):
        if provider != "fastdraft":
            continue
        others = [
            f"{p} {number(r['us'], 0)}"
            for (o, s, d, _, p), r in last.items()
            if (o, s, d) == (op, shape, dtype) and p != provider
        ]
        rate = number(row["flops"] / row["us"] / 1e6, 0) if row["flops"] else ""
        size = " ".join(f"{k} {v}" for k, v in json.loads(shape).items())
        band = number(row["bytes"] / row["us"] / 1e6, 2)
        name = op if dtype == "bf16" else f"{op}, {dtype}"
        lines.append([name, size, number(row["us"], 0), rate, band, number(row["pct_of_roof"], 0), ", ".join(others)])
    header = ["kernel", "shape", "us", "TFLOP/s", "TB/s", "% of roof", "beside it, us"]
    return table(header, lines) if lines else ""


# --- page and plots ------------------------------------------------------------------------------------------------------


def gpus(rows: list[dict]) -> list[str]:
    return sorted({row["gpu"] for row in rows if row.get("gpu") and row["provider"] == "fastdraft"})


def page(rows: list[dict]) -> str:
    parts = [HEAD]
    for gpu in gpus(rows):
        steps = Steps(rows, gpu)
        sections = {name: getattr(steps, name)() for name in TITLES}
        sections = {name: text for name, text in sections.items() if text}
        if sections:
            parts.append(f"## The draft step, {gpu}\n")
        for name, text in sections.items():
            parts += [f"### {TITLES[name]}\n", STEP_TEXT[name] + "\n", text]
            plot = {"live": "step-time", "memory": "step-memory"}.get(name)
            if plot and curve(steps):
                parts.append(f"![{TITLES[name]} against context length](img/{plot}-{slug(gpu)}.svg)\n")
        blocks = Blocks(rows, gpu)
        texts = {name: text for name in BLOCK_TITLES if (text := getattr(blocks, name)())}
        if texts:
            parts.append(f"## The step of block drafts, {gpu}\n")
        for name, text in texts.items():
            parts += [f"### {BLOCK_TITLES[name]}\n", STEP_TEXT[name] + "\n", text]
        text = kernels(rows, gpu)
        if text:
            parts += [f"## Kernels, {gpu}\n", KERNEL_TEXT, text]
            if any(row["flops"] for row in roofline(rows, gpu)):
                parts.append(f"![Roofline](img/roofline-{slug(gpu)}.svg)\n")
    return "\n".join(parts)


def slug(gpu: str) -> str:
    return gpu.lower().replace("nvidia ", "").split(" ")[0]


def curve(steps: Steps) -> list[tuple[int, dict, dict | None]]:  # tokens, ours, the peer's
    """Llama-3.1-8B's live rows that have times."""
    pairs = {place: pair[1] for place, pair in steps.pairs.items()}
    live = [(place, row) for place, row in steps.of("live") if place[0] == MAIN and "failed" not in row]
    return [(place[2], row, pairs.get(place)) for place, row in live]


def roofline(rows: list[dict], gpu: str) -> list[dict]:
    mine = [r for r in rows if "pct_of_roof" in r and r["gpu"] == gpu and r["provider"] == "fastdraft"]
    return [found[-1] for found in newest(mine).values()]


def plots(rows: list[dict], folder: Path) -> None:
    """SVG files of the page, the same bytes for the same rows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "fastdraft", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    )
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)

    for gpu in gpus(rows):
        points = curve(Steps(rows, gpu))
        for name, label, value in (
            ("step-time", "us per token", lambda row: row.get("us_per_token")),
            ("step-memory", "peak GiB", lambda row: row["memory"]["peak"] / GIB if "memory" in row else None),
        ):
            if not points:
                break
            figure, axes = plt.subplots(figsize=(5, 3))
            for who, marks in (
                ("fastdraft", [(n, value(ours)) for n, ours, _ in points]),
                ("SpecForge", [(n, value(peer)) for n, _, peer in points if peer]),
            ):
                marks = [(n, y) for n, y in marks if y is not None]
                if marks:
                    axes.plot(*zip(*marks, strict=True), marker="o", label=who)
            axes.set_xscale("log", base=2)
            axes.set_xticks([n for n, *_ in points], [short(n) for n, *_ in points])
            axes.set(xlabel="tokens", ylabel=label, ylim=(0, None), title=f"{NAMES[MAIN]}'s draft, T 7, {gpu}")
            axes.legend()
            save(figure, f"{name}-{slug(gpu)}")
        dots = [row for row in roofline(rows, gpu) if row["flops"]]
        if dots:
            figure, axes = plt.subplots(figsize=(5, 3.5))
            for op in sorted({row["op"] for row in dots}):
                mine = [row for row in dots if row["op"] == op]
                x = [row["flops"] / row["bytes"] for row in mine]
                axes.plot(x, [row["flops"] / row["us"] / 1e6 for row in mine], "o", markersize=4, label=op)
            matrix = max(row["flops"] / row["us"] / 1e6 * 100 / row["pct_of_roof"] for row in dots)
            copies = [r["bytes"] / r["us"] / 1e6 * 100 / r["pct_of_roof"] for r in roofline(rows, gpu) if not r["flops"]]
            left, right = 10.0, 2 * max(row["flops"] / row["bytes"] for row in dots)
            knee = matrix / max(copies) if copies else left
            axes.plot([left, knee, right], [matrix * left / knee, matrix, matrix], color="grey", linewidth=1)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="FLOP per byte",
                ylabel="TFLOP/s",
                title=f"Kernels under the roof, {gpu}",
            )
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter("")
            axes.legend(fontsize=7)
            save(figure, f"roofline-{slug(gpu)}")


def main() -> None:
    rows = read(ROOT / "bench/results")
    (ROOT / "docs/performance.md").write_text(page(rows))
    plots(rows, ROOT / "docs/img")


if __name__ == "__main__":
    main()
