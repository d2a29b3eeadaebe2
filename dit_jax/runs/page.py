"""The look of a report: one HTML file that holds everything and requests nothing.

Plotly's script is 4.8 MB, so the file has it compressed (2 MB); browsers of 2023 and later unpack
it. A policy in the head forbids every request.
"""

import base64
import functools
import gzip
import json
from html import escape

POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; color: #222; background: #fff;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 8px 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 8px; padding-top: 12px; border-top: 1px solid #ddd; }
h3 { font-size: 14px; margin: 4px 0; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 4px 0 8px; }
.small { color: #666; font-size: 13px; }
.problem { background: #fff3e0; border-left: 4px solid #d55e00; padding: 8px 12px;
  overflow-wrap: anywhere; }
.tiles { display: grid; gap: 8px; margin: 12px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 170px), 1fr)); }
.tile { background: #f5f6f7; border-radius: 6px; padding: 8px 12px; }
.tile b { display: block; font-size: 18px; overflow-wrap: anywhere; }
.tile sup { line-height: 0; }
.tile span { color: #666; font-size: 13px; }
.charts { display: grid; gap: 16px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.chart { min-width: 0; }
.plot { height: 290px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 3px 16px 3px 0; border-bottom: 1px solid #eee;
  vertical-align: top; }
th { color: #666; font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.name { white-space: nowrap; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; }
.run { white-space: nowrap; }
.slider { position: sticky; top: 0; background: #fff; padding: 6px 0; display: flex; gap: 12px;
  align-items: center; z-index: 2; }
.slider input { flex: 1; max-width: 560px; min-width: 0; }
.slider output { min-width: 110px; font-variant-numeric: tabular-nums; }
.samples { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }
figure { margin: 0; }
figure img { max-width: 100%; height: auto; image-rendering: auto; border-radius: 4px; }
summary { cursor: pointer; margin: 8px 0; }
@media (max-width: 500px) { body { padding: 10px; font-size: 14px; } h1 { font-size: 20px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 16px; }
  table { font-size: 13px; } th, td { padding-right: 8px; } }
"""
DRAW = """
async function draw() {
  const packed = document.getElementById("plotly").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const narrow = innerWidth < 600;  // there a finger scrolls the page, not the curve
  const charts = JSON.parse(document.getElementById("charts").textContent);
  for (const [i, chart] of charts.entries()) {
    if (narrow) chart.layout.dragmode = false;
    Plotly.newPlot(`chart${i}`, chart.data, chart.layout,
      { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover" });
  }
}
draw().catch((error) => {
  for (const plot of document.querySelectorAll(".plot"))
    plot.textContent = "This browser cannot draw the curves: " + error.message;
});
"""
SLIDE = """
const slider = document.getElementById("slider");
if (slider) slider.oninput = () => {
  const step = JSON.parse(slider.dataset.steps)[slider.value];
  document.getElementById("step").textContent = "step " + step.toLocaleString("en");
  for (const figure of document.querySelectorAll(".samples figure")) {
    const images = [...figure.querySelectorAll("img")];
    const before = images.filter((image) => image.dataset.step <= step);
    for (const image of images) image.hidden = image !== (before.at(-1) ?? images[0]);
  }
};
"""


def write(title, body, figures):
    """The text of a page. body: HTML with a `plot(i)` for each of the figures of Plotly."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
{_scripts(figures)}
<script>{SLIDE}</script>
</body>
</html>
"""


def _scripts(figures):
    if not figures:
        return ""
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<script type="application/json" id="charts">{data}</script>\n'
        f'<script type="text/plain" id="plotly">{_plotly()}</script>\n<script>{DRAW}</script>'
    )


@functools.cache
def _plotly():
    """Plotly's script, compressed, as base64."""
    from plotly import offline  # here, since it takes a tenth of a second

    return base64.b64encode(gzip.compress(offline.get_plotlyjs().encode(), mtime=0)).decode()


def plot(index):
    """The place of a figure."""
    missing = "<noscript>The curves need JavaScript.</noscript>"
    return f'<div class="plot" id="chart{index}">{missing}</div>'


def section(title, *parts):
    """A heading and its parts, HTML; "" if all parts are empty."""
    text = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{text}" if text else ""


def paragraph(text, kind=""):
    return f'<p class="{kind}">{escape(text)}</p>'


class Html(str):
    """Text that is HTML already and is not escaped again."""


def marked(color, name):
    """The name of a run after a round mark in its colour."""
    mark = f'<span class="dot" style="background:{color}"></span>'
    return Html(f'<span class="run">{mark}{escape(name)}</span>')


def cell_text(value):
    """The HTML of a value: numbers with thousands separated, None as a dash."""
    if isinstance(value, Html):
        return str(value)
    if value is None:
        return "–"
    if type(value) is int:
        return f"{value:,}"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def table(header, rows):
    """A table of values and Html, numbers to the right; it scrolls where the page is too narrow."""
    if not rows:
        return ""
    head = "".join(f"<th>{cell_text(each)}</th>" for each in header)
    lines = []
    for row in rows:
        kinds = [' class="number"' if type(x) in (int, float) else "" for x in row]
        kinds[0] = kinds[0] or ' class="name"'
        cells = zip(row, kinds, strict=True)
        lines.append("".join(f"<td{kind}>{cell_text(x)}</td>" for x, kind in cells))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def tiles(facts):
    """Facts {what: value} as tiles."""
    cells = (
        f'<div class="tile"><b>{cell_text(value)}</b><span>{escape(name)}</span></div>'
        for name, value in facts.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def folded(title, text):
    """Text that opens with a click."""
    return f"<details><summary>{escape(title)}</summary>{text}</details>" if text else ""
