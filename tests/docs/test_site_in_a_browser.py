"""The site looks right in Chromium, on a desktop and on a telephone; the screenshots go to ``build/screenshots``."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = [
    "index",
    "how-to/write-a-strategy",
    "reference/python",
    "reference/contracts/strategy",
    "tutorials/first-training",
]
SIZES = {"desktop": (1280, 900), "narrow": (390, 844)}

# A window of Chromium has a smallest width, which a frame has not.
FRAME = """<!doctype html><style>body{margin:0}iframe{border:0;display:block}</style>
<iframe id=page width=%d height=%d></iframe><script>
const frame = document.getElementById("page");
frame.onload = () => setTimeout(() => {
  const inner = frame.contentDocument, root = inner.documentElement;
  const title = inner.querySelector("h1");
  const shown = (one) => one.getClientRects().length > 0;
  const seen = {
    width: root.clientWidth, scroll: root.scrollWidth,
    title: title && shown(title) ? title.textContent : "",
    styled: inner.styleSheets.length > 0 && getComputedStyle(inner.body).margin === "0px",
    images: [...inner.images].filter((one) => shown(one) && !one.naturalWidth).map((one) => one.src),
    menu: [...inner.querySelectorAll("label[for=__drawer]")].some(shown),
    sidebar: [...inner.querySelectorAll(".md-sidebar--primary a")].some(
      (one) => one.getBoundingClientRect().left >= 0 && shown(one)),
  };
  const out = document.createElement("template");
  out.id = "seen"; out.setAttribute("data-seen", encodeURIComponent(JSON.stringify(seen)));
  document.body.append(out);
}, 500);
frame.src = "%s";
</script>"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Build the site and serve it; give its folder and address."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=110)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _browse(profile: Path, *words: str) -> str:
    """Run Chromium once; give what it prints."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    options += ["--virtual-time-budget=8000"]
    return subprocess.run([CHROMIUM, *options, *words], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.authors
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_and_is_styled(site: tuple[Path, str], page: str, size: str, tmp_path: Path) -> None:
    """Nothing is wider than the window, pictures load, and the way to the other pages is there."""
    folder, address = site
    width, height = SIZES[size]
    frame = folder / f"{size}-{page.replace('/', '-')}.html"
    frame.write_text(FRAME % (width, height, f"{address}/{page}.html"))
    found = re.search(r'data-seen="([^"]+)"', _browse(tmp_path, "--dump-dom", f"{address}/{frame.name}"))
    assert found is not None, "the page did not load"
    seen = json.loads(unquote(found[1]))
    SHOTS.mkdir(parents=True, exist_ok=True)
    shot = SHOTS / f"{frame.stem}.png"
    _browse(tmp_path, f"--screenshot={shot}", f"--window-size={max(width, 500)},{height}", f"{address}/{frame.name}")
    assert shot.stat().st_size > 10_000
    assert seen["scroll"] <= seen["width"] == width, seen
    assert seen["title"], seen
    assert seen["styled"], seen
    assert not seen["images"], seen
    assert seen["menu"] if size == "narrow" else seen["sidebar"], seen
