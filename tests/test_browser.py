"""What a person sees: all notebooks run in JupyterLab in a real browser, light and dark, and the page of answers.

Needs Debian's chromium and playwright (`make browser` installs the second); skips without. `-m "not browser"` leaves
these tests out.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.test_notebooks import NOTEBOOKS, ROOT, SMALL, copy_repository, load, source

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
PAGE = ROOT / "outputs" / "demo" / "side_by_side.html"
RATED = "MTS-Dialog-Manual-Scores4CorrelationStudy.csv"  # people's scores, which 05 fetches
PUBLISHED = all((ROOT / "data" / "raw" / name).exists() for name in (f"mts-dialog/{RATED}", "samsum"))
LESS = {  # parameters that keep a notebook to seconds; 05 scores 60 rows; its trainings come from a committed table
    "OVERRIDES": repr({**SMALL, "prompt.max_tokens": 512, "training.sample_rows": 1}),
    "ROWS": "4",
    "MORE_SEEDS": "()\nimport pandas\nfrom src import data, published\n"
    "data.evaluation_rows = lambda recipe, rows=data.evaluation_rows: rows(recipe)[:60]\n"
    "published.measure = lambda *_: "
    "pandas.read_csv('outputs/published_recipes/defects_by_seed.csv').assign(**{'ended by EOS': 1.0})",
}
SEEN = """
() => {
  const channels = text => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const canvas = document.body.appendChild(document.createElement("i"));  // what lies behind all, in this theme
  canvas.style.background = "Canvas";
  const paper = channels(getComputedStyle(canvas).backgroundColor);
  canvas.remove();
  const contrast = element => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(getComputedStyle(e));
    let behind = paper, opacity = 1;
    for (const style of chain) {
      behind = over(channels(style.backgroundColor), behind);
      opacity *= Number(style.opacity);
    }
    const color = channels(getComputedStyle(element).color);
    color[3] *= opacity;
    const [a, b] = [light(over(color, behind)), light(behind)].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  const visible = e => e.checkVisibility() && e.getBoundingClientRect().width > 1;
  const texts = [...document.querySelectorAll("SCOPE")].flatMap(e => [e, ...e.querySelectorAll("*")])
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && visible(e));
  const size = e => { const box = e.getBoundingClientRect(); return [box.width, box.height] };
  return {
    contrasts: [...new Set(texts)].map(e => [contrast(e), e.textContent.trim().slice(0, 40)]),
    tables: [...document.querySelectorAll("SCOPE table")].map(e => [...size(e), e.rows.length]),
    figures: [...document.querySelectorAll("SCOPE img")].map(e => [...size(e), e.naturalWidth]),
  };
}
"""
STATE = """
() => {
  const panel = jupyterapp.shell.currentWidget, session = panel.sessionContext.session;
  const code = panel.content.widgets.map(w => w.model).filter(m => m.type === "code");
  const errors = code.flatMap(m => m.outputs.toJSON()).filter(o => o.output_type === "error");
  return {
    ready: session?.kernel?.status === "idle" && panel.content.fullyRendered !== false,
    done: code.filter(m => m.executionCount).length, cells: code.length,
    busy: session?.kernel?.status !== "idle" || code.some(m => m.executionState === "running"),
    errors: errors.map(o => `${o.ename}: ${o.evalue}`),
  };
}
"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])


def shorten(path):
    """Replace the parameters that LESS names in a copy's parameters cell, and drop all outputs."""
    notebook = load(path)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = source(cell)
            for name, value in LESS.items():
                cell["source"] = re.sub(
                    rf"^{name} = .*", lambda _, n=name, v=value: f"{n} = {v}", cell["source"], flags=re.M
                )
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab as `make lab` starts it, in a copy of the repository: its address."""
    folder = tmp_path_factory.mktemp("repository")
    copy_repository(folder)
    for name in ("mts-dialog", "samsum") if PUBLISHED else ():
        (folder / "data" / "raw" / name).symlink_to(ROOT / "data" / "raw" / name)
    for name in ("demo", "samsum_small", "published_recipes"):
        shutil.copytree(ROOT / "outputs" / name, folder / "outputs" / name)
    recipe = re.search(r"^lab:.*\n\t(.*)\n\t(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M).groups()
    copy, start = (line.replace("$(BIN)", str(Path(sys.executable).parent)).split() for line in recipe)
    subprocess.run(copy, cwd=folder, check=True, timeout=60)
    for path in (folder / "lab").glob("*.ipynb"):
        shorten(path)
    settings = {  # all cells drawn, whatever is scrolled to; no news from the network
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(folder / ".jupyter" / name)
    flags = f"--no-browser --allow-root --port={port} --ServerApp.port_retries=0 --expose-app-in-browser".split()
    flags += [
        "--ServerApp.shutdown_no_activity_timeout=600",
        "--MappingKernelManager.cull_idle_timeout=300",
    ]  # orphaned
    flags += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [*start, *flags], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: _answers(f"{address}/api/status"), 120, lambda: (folder / "lab.log").read_text()[-2000:])
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _answers(address) -> bool:
    try:
        return urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def _wait(holds, seconds: float, say=lambda: ""):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {say()}"
        time.sleep(0.5)


def start(context, address: str, name: str):
    """Open a notebook and Run All Cells from the menu, as a person does. The page, with its kernel at work."""
    page = context.new_page()
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext", timeout=120_000)
    _wait(lambda: page.evaluate(STATE)["ready"], 120, lambda: page.evaluate(STATE))
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    return page


def finish(page) -> dict:
    """Wait for the kernel; what then stands on the page: errors, and sizes and contrasts in each theme."""

    def over():
        state = page.evaluate(STATE)
        return state["errors"] or (state["done"] == state["cells"] and not state["busy"])

    _wait(over, 400, lambda: page.evaluate(STATE))
    found = {"state": page.evaluate(STATE)}
    for theme in ("Light", "Dark"):
        page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
        page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{str(theme == 'Light').lower()}'")
        found[theme] = settled(page)
    page.close()
    return found


def settled(page) -> dict:
    """What is seen once it does not change any more and nothing is without size; after 20 tries, what is seen then."""
    seen = None
    for _ in range(20):
        before = seen
        page.wait_for_timeout(300)
        seen = page.evaluate(SEEN.replace("SCOPE", ":is(.jp-OutputArea-output, .jp-RenderedMarkdown)"))
        if seen == before and all(width for width, *_ in seen["tables"] + seen["figures"]):
            break
    return seen


@pytest.fixture(scope="module")
def shown(browser, lab):
    """What every notebook shows after Run All. 05 and 06 need no other notebook and run beside the others."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(120_000)
    names = [path.stem for path in NOTEBOOKS if PUBLISHED or not path.stem.startswith("05")]
    beside = {name: start(context, lab, name) for name in names if name.startswith(("05", "06"))}
    found = {name: finish(start(context, lab, name)) for name in names if name not in beside}
    yield found | {name: finish(page) for name, page in beside.items()}
    context.close()


def wanted(path):
    """(tables, figures) that a notebook has as it is committed, counted in its outputs."""
    data = [o.get("data", {}) for c in load(path)["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    return sum("<table" in "".join(d.get("text/html", "")) for d in data), sum("image/png" in d for d in data)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_seen_in_both_themes(shown, path):
    if path.stem not in shown:
        pytest.skip("the published files are not in data/raw")
    found, (tables, figures) = shown[path.stem], wanted(path)
    assert not found["state"]["errors"]
    for theme in ("Light", "Dark"):
        seen = found[theme]
        assert len(seen["tables"]) >= tables and len(seen["figures"]) >= figures, theme
        assert all(w > 120 and h > 35 and n > 1 for w, h, n in seen["tables"]), (theme, seen["tables"])
        assert all(w > 300 and h > 150 and real > 300 for w, h, real in seen["figures"]), (theme, seen["figures"])
        assert len(seen["contrasts"]) > 20
        assert not [text for text in seen["contrasts"] if text[0] < 4.5], theme


def test_themes_differ_and_contrast_is_measured(shown):
    light, dark = (shown["04_compare"][theme]["contrasts"] for theme in ("Light", "Dark"))
    assert len(light) == len(dark) and light != dark
    assert 4.5 <= min(light)[0] <= max(light)[0] <= 21.01


@pytest.fixture(params=["light", "dark"])
def answers(browser, request):
    """The committed page of answers, opened from its file without a network, and every address that it asked for."""
    context = browser.new_context(color_scheme=request.param, offline=True)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(PAGE.as_uri())
    yield page, asked
    context.close()


def rows(page, what="dataset.section"):
    return page.evaluate(f"() => [...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => a.{what})")


def test_the_page_of_answers_is_filtered_sorted_and_walked_by_keys_offline(answers):
    page, asked = answers
    assert len(rows(page)) == 200 and page.locator("output").inner_text() == "200 of 200 rows"
    page.get_by_label("Section").select_option("ALLERGY")
    allergies = rows(page)
    assert set(allergies) == {"ALLERGY"} and page.locator("output").inner_text() == f"{len(allergies)} of 200 rows"
    page.get_by_label("Sort").select_option("most gained against base")
    gains = [float(gain) for gain in rows(page, "dataset.gain")]
    assert len(gains) == len(allergies) > 5 and gains == sorted(gains, reverse=True) and gains[0] > gains[-1]
    page.get_by_label("Section").select_option("")
    page.get_by_label("Flag").select_option("base-new")
    flagged = rows(page, "dataset.flags")
    assert 0 < len(flagged) < 200 and all("base-new" in flags for flags in flagged)
    page.get_by_label("Flag").select_option("")
    page.keyboard.press("Tab")  # leaves the select, where a letter chooses
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type("allerg")
    found = rows(page, "textContent.toLowerCase()")
    assert 0 < len(found) < 200 and all("allerg" in text for text in found)
    page.keyboard.press("Escape")
    at = "() => [...document.querySelectorAll('article')].filter(a => !a.hidden).indexOf(document.activeElement)"
    walked = []
    for key in "jjk":
        page.keyboard.press(key)
        walked.append(page.evaluate(at))
    assert walked == [0, 1, 0]
    page.keyboard.press("j")
    controls, row = page.locator("#controls").bounding_box(), page.locator("article:focus").bounding_box()
    assert page.evaluate("() => scrollY") > 0 and controls["y"] == 0  # they stay, and hide nothing of the row
    assert controls["height"] <= row["y"] < 200
    assert asked == [PAGE.as_uri()]


def test_the_page_of_answers_can_be_read(answers):
    page, _ = answers
    seen = page.evaluate(SEEN.replace("SCOPE", "body"))
    assert len(seen["tables"]) == 200 and all(w > 500 and h > 80 for w, h, _ in seen["tables"])
    assert not [text for text in seen["contrasts"] if text[0] < 4.5]
