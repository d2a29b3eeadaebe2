"""Opens a page in headless Chromium, runs a script in it, and returns what that finds.

Chromium comes from the system: `apt-get install chromium`.
"""

import html
import json
import re
import shutil
import subprocess

RUN = """
<script>
addEventListener("load", async () => {
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  const until = async (condition) => { while (!condition()) await sleep(20); };
  const find = async () => { %s };
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(await find().catch((error) => String(error)));
  parent.document.body.append(result);
});
</script>
</body>"""
FRAME = '<body style="margin: 0"><iframe style="border: 0" width="{}" height="900" srcdoc="{}">'
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--virtual-time-budget=60000", "--dump-dom"),
)


def evaluate(page, script, *, width=1280):
    """What a script returns after an HTML file was opened, as JSON.

    script: the body of an async function of JavaScript; it may await sleep(milliseconds) and
    until(condition). width: of the page, in pixels. The page is in a frame, since Chromium has no
    window below 500 pixels.
    """
    chromium = shutil.which("chromium")
    assert chromium, "this test needs Chromium: apt-get install chromium"
    before, end, after = page.read_text().rpartition("</body>")
    assert end
    opened = page.with_name(f"opened-{page.name}")
    opened.write_text(FRAME.format(width, html.escape(before + RUN % script + after)))
    command = [chromium, *FLAGS, "--window-size=1280,900", opened.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (found,) = re.findall('<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found))
