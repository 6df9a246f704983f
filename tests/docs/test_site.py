"""The built site in a real browser, wide and narrow: nothing is cut, nothing sticks out."""

from __future__ import annotations

import functools
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 400)

# A page that opens each page of the site in a frame of each width, and measures what is in it.
HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, widths = WIDTHS;
function faults(page, width, frame) {
  const doc = frame.contentDocument, found = [], say = (what, e) =>
    found.push(`${page} at ${width}: ${what}: ${(e.alt || e.innerText || "").slice(0, 60)}`);
  doc.querySelectorAll("details").forEach(e => { e.open = true; });
  const edge = frame.contentWindow.innerWidth + 1, content = doc.querySelector(".md-content");
  if (!content) return [`${page} at ${width}: no content`];
  const wide = doc.documentElement.scrollWidth;
  if (wide > edge) found.push(`${page} at ${width}: the page is ${wide} wide`);
  const scrolls = e => ["auto", "scroll"].includes(frame.contentWindow.getComputedStyle(e).overflowX);
  content.querySelectorAll("img, table, pre, p, li, h1, h2, h3, summary").forEach(e => {
    const box = e.getBoundingClientRect();
    if (e.tagName === "IMG" && (!e.complete || !e.naturalWidth)) say("a picture is not there", e);
    if (box.right <= edge && !(e.tagName === "TABLE" && e.scrollWidth > e.clientWidth + 1)) return;
    for (let at = e; at && at !== content; at = at.parentElement) if (scrolls(at)) return;
    say(`${e.tagName} is cut, or sticks out`, e);
  });
  return found;
}
const report = found => fetch("/found", {method: "POST", body: JSON.stringify(found)});
(async () => {
  const all = [];
  let seen = 0;
  for (const width of widths) for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    const loaded = new Promise(done => { frame.onload = done; });
    frame.src = page;
    document.body.append(frame);
    await loaded;
    all.push(...faults(page, width, frame));
    seen += 1;
    frame.remove();
  }
  return {seen, all};
})().then(report, error => report({seen: 0, all: [String(error)]}));
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """A server of the site's files that receives the browser's findings."""

    found: queue.Queue[dict[str, object]] = queue.Queue()

    def do_POST(self) -> None:
        """Store the findings of the measuring page."""
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(reason=f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def site(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Build the site, and yield its folder and its address while a server runs."""
    pytest.importorskip("mkdocs", reason="the site's tools are not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def measured(browser: str, site: tuple[Path, str], pages: list[str], profile: Path) -> dict[str, object]:
    """Return how many pages the browser measured, and the faults that it found."""
    folder, address = site
    harness = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    (folder / "harness.html").write_text(harness)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={profile}", "--window-size=1400,1000", "--remote-debugging-port=0",
        f"{address}/harness.html",
    ]  # fmt: skip
    with (
        (profile.parent / "browser.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as running,
    ):
        try:
            return Handler.found.get(timeout=120)
        finally:
            running.terminate()


def test_nothing_is_cut(browser: str, site: tuple[Path, str], tmp_path: Path) -> None:
    pages = sorted(str(path.relative_to(site[0])) for path in site[0].rglob("index.html"))
    assert len(pages) > 15
    found = measured(browser, site, pages, tmp_path)
    assert found == {"seen": len(pages) * len(WIDTHS), "all": []}


def test_a_cut_table_is_found(browser: str, site: tuple[Path, str], tmp_path: Path) -> None:
    """Check that the measurements find a wide table that cannot scroll, and a missing picture."""
    page = (site[0] / "glossary" / "index.html").read_text()
    wide = f'<p style="width:3000px">{"wide " * 9}</p><img src="no.svg" alt="none">'
    bad = page.replace("</article>", f"<div>{wide}</div></article>")
    (site[0] / "bad.html").write_text(bad.replace("../", ""))
    found = measured(browser, site, ["bad.html"], tmp_path)
    assert found["seen"] == len(WIDTHS)
    assert any("P is cut" in fault for fault in found["all"])
    assert any("not there: none" in fault for fault in found["all"])
