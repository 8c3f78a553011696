"""The page in a real browser: it renders, complains about nothing, and asks the network for nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moe_export.bundle.reader import Bundle
from moe_export.report.html import render_html
from tests.report.pages import Page
from tests.report.samples import hostile_bundle, make_usage

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
)  # fmt: skip
OWN_HOSTS = re.compile(r"//[^/]*(google\.com|googleapis\.com|gvt1\.com)[:/]")
"""What a browser asks for by itself, whatever the page."""
Parts = dict[str, Any]

pytestmark = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("CI"),
    reason="no chromium, chromium-browser or google-chrome here (Debian's package is chromium)",
)


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page. ``requests``: addresses it asked for beyond the page itself."""

    page: Page
    console: list[str]
    requests: list[str]


def run_browser(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None, "continuous integration must have a headless browser"
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def visit(html: str, folder: Path) -> Visit:
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "page.html", folder / "net.json"
    file.write_text(html, encoding="utf-8")
    done = run_browser(folder, f"--log-net-log={log}", "--dump-dom", file.as_uri())
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    urls = {str((event.get("params") or {}).get("url", "")) for event in events}
    requests = sorted(u for u in urls if "://" in u and not u.startswith("file:") and not OWN_HOSTS.search(u))
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Visit(Page(done.stdout), console, requests)


@pytest.fixture(scope="module")
def visited(
    bundle: Bundle, parity: Parts, bench: Parts, usage: Parts, tmp_path_factory: pytest.TempPathFactory
) -> Visit:
    html = render_html(bundle, parity=parity, bench=bench, usage=usage)
    return visit(html, tmp_path_factory.mktemp("visit"))


def test_every_section_is_there(visited: Visit) -> None:
    for heading in (
        "Summary",
        "Routing",
        "Parity",
        "Levels",
        "Layers",
        "Speed",
        "Lowering decisions",
        "Manifest",
    ):
        assert heading in visited.page.headings
    assert len(visited.page.text) > 4000


def test_the_heatmap_has_a_cell_per_layer_and_expert(visited: Visit, usage: Parts) -> None:
    assert len(visited.page.with_class("cell")) == sum(len(x["counts"]) for x in usage["layers"]) == 8


def test_the_plots_are_drawn(visited: Visit) -> None:
    assert sum(tag == "svg" for tag, _ in visited.page.elements) == 4


def test_no_complaint_and_no_request(visited: Visit) -> None:
    assert visited.console == []
    assert visited.requests == []


def test_complaints_and_requests_would_be_seen(tmp_path: Path) -> None:
    bad = visit('<img src="http://127.0.0.1:9/x.png"><script>missing()</script><h1>x</h1>', tmp_path)
    assert any("missing is not defined" in line for line in bad.console)
    assert bad.requests == ["http://127.0.0.1:9/x.png"]


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    usage = make_usage()
    usage["layers"][0]["name"] = "<script>document.body.innerHTML=''</script>"
    found = visit(render_html(hostile_bundle(tmp_path / "tiny"), usage=usage), tmp_path / "visit")
    assert found.console == [] and found.requests == []
    assert not {"script", "img"} & {tag for tag, _ in found.page.elements}
    assert "Manifest" in found.page.headings


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_of_it_is_not_empty(
    bundle: Bundle, parity: Parts, bench: Parts, usage: Parts, tmp_path: Path, scheme: str
) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(render_html(bundle, parity=parity, bench=bench, usage=usage), encoding="utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    run_browser(tmp_path, *dark, "--window-size=900,1400", f"--screenshot={picture}", file.as_uri())
    with Image.open(picture) as image:
        assert image.size == (900, 1400)
        pixels = np.asarray(image.convert("RGB"))
    brightness = pixels.mean() / 255
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert brightness > 0.75 if scheme == "light" else brightness < 0.35
