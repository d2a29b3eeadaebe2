"""The report in a browser: its curves, its slider, its legend, and that it requests nothing."""

import signal

import browser
import pytest
import small_run
import written_run

from dit_jax.runs import report

pytestmark = pytest.mark.slow  # a browser takes seconds to draw ten charts
ENDS = {
    "finished": {"event": "finished", "step": 100},
    "diverged": {"event": "diverged", "step": 100, "reason": "loss is nan"},
    "resumed": {"event": "resumed", "step": 40, "lost": 3},
}
DRAWN = """
  const plots = [...document.querySelectorAll(".plot")];
  await until(() => plots.every((plot) => plot.querySelector(".scatterlayer .trace")));
"""
LOOK = """
  const look = () => ({
    steps: [...document.querySelectorAll(".samples img")].filter((image) => !image.hidden)
      .map((image) => Number(image.dataset.step)),
    step: document.getElementById("step").textContent,
    curves: plots[0].querySelectorAll(".scatterlayer .trace").length,
  });
  const found = [look()];
  const slider = document.getElementById("slider");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  for (const kind of ["mousedown", "mouseup"])
    plots[0].querySelector(".legendtoggle").dispatchEvent(new MouseEvent(kind, { bubbles: true }));
  await sleep(2000);  // Plotly waits for a second click
  found.push(look());
  return found;
"""


def write(tmp_path, *names):
    paths = []
    for i, name in enumerate(names):
        events = [written_run.STARTED, ENDS[name]]
        paths.append(written_run.write(tmp_path / name, events=events, frechet_distance=2.5, kid=1))
        written_run.samples(paths[-1], 50, 100 + 10 * i, size=(600, 300))
    report.write(paths, tmp_path / "report.html")
    return tmp_path / "report.html"


@pytest.mark.parametrize("name", ENDS)
def test_the_slider_and_the_legend_change_what_is_seen(tmp_path, name):
    before, after = browser.evaluate(write(tmp_path, name), DRAWN + LOOK)
    assert before == {"steps": [100], "step": "step 100", "curves": 2}
    assert after == {"steps": [50], "step": "step 50", "curves": 1}


def test_three_runs_are_overlaid_and_one_click_hides_one_of_them(tmp_path):
    before, after = browser.evaluate(write(tmp_path, *ENDS), DRAWN + LOOK)
    assert before == {"steps": [100, 110, 120], "step": "step 120", "curves": 6}
    assert after == {"steps": [50, 50, 50], "step": "step 50", "curves": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three runs of dit-train: one that nothing disturbed, one resumed, one that diverged."""
    folder = tmp_path_factory.mktemp("trained")
    small_run.finish(small_run.start(folder / "finished"))
    process = small_run.start(folder / "resumed")
    small_run.wait_for_step(process, folder / "resumed", 35)
    process.send_signal(signal.SIGTERM)
    small_run.finish(process, code=42)
    small_run.finish(small_run.start(folder / "resumed"))
    options = ("--config.train.learning_rate=1", "--config.run.spike_factor=1.5")
    process = small_run.start(folder / "diverged", *options, "--config.run.max_rollbacks=1")
    small_run.finish(process, code=3)
    return folder


def test_each_report_that_training_wrote_opens(trained):
    for name, said in {
        "finished": "finished",
        "resumed": "resumed from step",
        "diverged": "went back to step",
    }.items():
        script = "return [document.body.innerText, plots.length];"
        text, plots = browser.evaluate(trained / name / "report.html", DRAWN + script)
        assert said in text and plots == 5
    assert "diverged at step 2" in text


def test_runs_of_training_are_overlaid(trained, tmp_path):
    report.write([trained / name for name in ENDS], tmp_path / "report.html")
    before, after = browser.evaluate(tmp_path / "report.html", DRAWN + LOOK)
    assert before["curves"] == 6 and after["curves"] == 4
    assert before["steps"] == [60, 60] and after["steps"] == [30, 30]


REQUESTS = """
  const blocked = [];
  const note = (reports) => blocked.push(...reports.map((each) => each.body.blockedURL));
  new ReportingObserver(note, { types: ["csp-violation"], buffered: true }).observe();
  await sleep(200);
  const requests = performance.getEntriesByType("resource").map((each) => each.name);
  const broken = [...document.images].filter((image) => !image.complete || !image.naturalWidth);
"""


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_fits_the_window_and_requests_nothing(tmp_path, width):
    script = f"""{DRAWN} {REQUESTS}
      return [innerWidth, document.documentElement.scrollWidth, requests, blocked, broken.length];
    """
    found = browser.evaluate(write(tmp_path, *ENDS), script, width=width)
    assert found == [width, width, [], [], 0]


def test_a_request_would_be_blocked_and_seen(tmp_path):
    page, address = write(tmp_path, "finished"), "http://127.0.0.1:9/x.png"
    page.write_text(page.read_text().replace("</h1>", f'</h1><img src="{address}">'))
    blocked, broken = browser.evaluate(page, f"{REQUESTS} return [blocked, broken.length];")
    assert blocked == [address] and broken == 1
