"""Draws docs/img/ttt-step.svg, the README's picture of one chain of TTT steps: python docs/img/ttt_step.py

Plain SVG text with an opaque ground of its own, so that it can be read on a white page and on a dark one; where a viewer
tells the picture that the page is dark, its colours change too.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 640, 540
TOKENS = ["The", "cat", "sat", "on", "the", "mat"]
AT, STEPS = 1, 3  # the chain stands at "cat" and drafts three tokens

STYLE = """
  text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 17px; fill: #1f2328 }
  .title { font-size: 19px; font-weight: 600 }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .ground { fill: #ffffff; stroke: #d0d7de }
  .box, .free { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.5 }
  .free { stroke-dasharray: 4 4 }
  .shared { fill: #b6dcff; stroke: #0969da; stroke-width: 2 }
  .own { fill: #ffd8a8; stroke: #bc4c00; stroke-width: 2 }
  .token { fill: #dafbe1; stroke: #1a7f37; stroke-width: 1.5 }
  .line { stroke: #57606a; stroke-width: 2; fill: none; marker-end: url(#arrow) }
  .tip { fill: #57606a }
  .chunk { fill: none; stroke: #57606a; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ground { fill: #0d1117; stroke: #30363d }
    .box, .free { fill: #161b22; stroke: #7d8590 }
    .shared { fill: #0c3d7a; stroke: #58a6ff }
    .own { fill: #6b3400; stroke: #f0883e }
    .token { fill: #0f3d1e; stroke: #3fb950 }
    .line, .chunk { stroke: #9da7b3 }
    .tip { fill: #9da7b3 }
  }
"""


def box(x: float, y: float, width: float, height: float, style: str, *lines: str) -> str:
    """A rectangle with lines of text in its middle."""
    first = y + height / 2 + 6 - 11 * (len(lines) - 1)
    rows = [text(x + width / 2, first + 22 * i, line, "middle") for i, line in enumerate(lines)]
    return f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>' + "".join(rows)


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x}" y="{y}">{words}</text>'


def arrow(*points: tuple[float, float]) -> str:
    return f'<path class="line" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def unrolled() -> list[str]:
    """The steps of the chain from left to right."""
    parts = [text(24, 36, f"One chain: {STEPS} tokens drafted after “{TOKENS[AT]} {TOKENS[AT + 1]}”", "title")]
    left, wide, gap, top = 176, 118, 36, 116
    parts.append(box(16, top, 124, 58, "box", "frozen target", f"at “{TOKENS[AT]}”"))
    parts.append(arrow((140, top + 29), (left - 4, top + 29)))
    parts.append(text(157, top + 18, "g", "middle"))
    for i in range(STEPS):
        x = left + i * (wide + gap)
        middle = x + wide / 2
        parts.append(box(x, top, wide, 58, "shared" if i == 0 else "own", "draft layer", f"step {i}"))
        parts.append(box(middle - 46, top + 92, 92, 32, "token", TOKENS[AT + 1 + i]))
        parts.append(arrow((middle, top + 92), (middle, top + 62)))
        parts.append(text(middle, top - 44, f"“{TOKENS[AT + 2 + i]}”?", "middle"))
        parts.append(arrow((middle, top), (middle, top - 32)))
        if i:
            parts.append(arrow((x - gap, top + 29), (x - 4, top + 29)))
            parts.append(text(x - gap / 2 - 2, top + 18, "h", "middle"))
    parts.append(text(24, top - 44, "loss against"))
    parts.append(text(24, top - 22, "the target’s P"))
    parts.append(text(24, top + 113, "token read"))
    return parts


def grid() -> list[str]:
    """Which keys and values the chain's last step sees, among those of all chains and steps."""
    top, left, wide, tall = 332, 104, 78, 40
    parts = [text(24, 286, f"What step {STEPS - 1} of this chain attends to", "title")]
    for column, token in enumerate(TOKENS):
        x = left + column * (wide + 8)
        parts.append(text(x + wide / 2, top - 8, token, "middle"))
        for step in range(STEPS):
            seen = column <= AT if step == 0 else column == AT
            style = "free" if not seen else "shared" if step == 0 else "own"
            parts.append(box(x, top + step * (tall + 8), wide, tall, style, "K, V" if seen else ""))
    for step in range(STEPS):
        parts.append(text(24, top + step * (tall + 8) + 26, f"step {step}"))
    first, last = left + AT * (wide + 8) - 4, left + (AT + 2) * (wide + 8) - 4
    parts.append(f'<rect class="chunk" x="{first}" y="{top - 28}" width="{last - first}" height="{3 * tall + 52}" rx="9"/>')
    parts.append(text((first + last) / 2, top + 3 * tall + 46, "a chunk", "middle"))
    parts.append(text(24, 522, "A column is a chain. Chains share step 0’s K, V and nothing else."))
    return parts


def picture() -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    tip = '<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
    defs = f'<defs>{tip}<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    ground = f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>'
    body = [f"<title>One chain of TTT steps</title><style>{STYLE}</style>", defs, ground, *unrolled(), *grid()]
    return "\n".join([head, *body, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("ttt-step.svg").write_text(picture())
