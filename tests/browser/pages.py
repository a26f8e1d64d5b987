"""Looking at pages in Chromium: open one at a width and in a theme, and ask what is wrong with it.

with browser() as chromium:
    with open_page(chromium, "walk.html", width=390, scheme="dark") as page:
        assert not problems(page)
        assert not contrast_offenders(page)
"""

import functools, sys, threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from chromium import FLAGS, find_chromium

WIDTHS = 390, 1280  # CSS pixels: a phone, a laptop
SCHEMES = "light", "dark"
HOSTS = "127.0.0.1", "localhost"

# The contrast of every text that is seen, by WCAG 2: (lighter + 0.05) / (darker + 0.05). A
# background is what is painted under the text: colors of all parents, laid over each other.
CONTRAST = r"""
([root, least]) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const known = {};
  const rgba = (text) => {
    if (known[text]) return known[text];
    const found = text.match(/^rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)$/);
    if (found) {
      const [r, g, b, a] = found.slice(1).map((part) => (part === undefined ? 1 : Number(part)));
      return (known[text] = [r, g, b, a]);
    }
    context.clearRect(0, 0, 1, 1);  // oklch(), color(): let the canvas convert them
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return (known[text] = [r, g, b, a / 255]);
  };
  const over = (top, below) => below.map((value, n) => top[n] * top[3] + value * (1 - top[3]));
  const light = (color) => {
    const [r, g, b] = color.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  const isDark = scheme.includes("dark") && (dark || !scheme.includes("light"));
  const paper = isDark ? [18, 18, 18] : [255, 255, 255];
  const seen = new Map();
  const backdrop = (element) => {  // color behind an element's text, and where it is an image
    if (!element) return {color: paper, image: false};
    if (seen.has(element)) return seen.get(element);
    const style = getComputedStyle(element);
    const below = backdrop(element.parentElement);
    const own = rgba(style.backgroundColor);
    const color = over([...own.slice(0, 3), own[3] * Number(style.opacity)], below.color);
    const image = style.backgroundImage !== "none" || (below.image && own[3] < 1);
    seen.set(element, {color, image});
    return seen.get(element);
  };
  const opacity = (element) =>
    element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
  const offenders = [];
  let number = 0;
  for (const start of document.querySelectorAll(root)) {
    const walker = document.createTreeWalker(start, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const text = node.data.trim();
      const element = node.parentElement;
      if (!text || element.closest("script, style, template, noscript, [hidden]")) continue;
      if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
      const box = element.getBoundingClientRect();
      if (!box.width || !box.height) continue;
      number += 1;
      const style = getComputedStyle(element);
      const {color: ground, image} = backdrop(element);
      if (image) continue;  // nobody can say without looking
      const own = rgba(element.closest("svg") ? style.fill : style.color);
      const color = over([...own.slice(0, 3), own[3] * opacity(element)], ground);
      const found = ratio(color, ground);
      if (found >= least) continue;
      const hex = (c) => "#" + c.map((v) => Math.round(v).toString(16).padStart(2, "0")).join("");
      offenders.push({
        text: text.slice(0, 60), tag: element.tagName.toLowerCase(),
        class: element.getAttribute("class") || "", id: element.closest("[id]")?.id || "",
        color: hex(color), background: hex(ground), ratio: Math.round(found * 100) / 100,
      });
    }
  }
  return {offenders, number};
}
"""

@contextmanager
def browser():
    "Chromium, headless and kept from the network as far as flags can."
    with sync_playwright() as playwright:
        # Playwright has its own flags of headless mode; ours go on top
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try: yield chromium
        finally: chromium.close()

class Quiet(SimpleHTTPRequestHandler):
    "Serves files and writes no log."

    def log_message(self, *args): pass

@contextmanager
def served(folder):
    "Address of a folder's files, on this machine only."
    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

def is_local(address):
    "Whether a request stays on this machine."
    parts = urlsplit(address)
    return parts.scheme in ("file", "data", "blob", "about") or parts.hostname in HOSTS

@contextmanager
def open_page(chromium, target, *, width=1280, height=800, scheme="light", scale=1):
    """A page by the path of a file or by its address. Requests that would leave the machine are
    stopped and noted in `page.requests_out`; messages of errors are in `page.errors`."""
    address = str(target)
    if "://" not in address: address = Path(target).resolve().as_uri()
    context = chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        device_scale_factor=scale,
        reduced_motion="reduce",
    )
    # furo remembers what its button was set to; set it before the page is there
    context.add_init_script(f"try {{ localStorage.setItem('theme', '{scheme}') }} catch {{}}")
    page = context.new_page()
    page.requests_out, page.errors = [], []

    def request(route):
        if is_local(route.request.url): return route.continue_()
        page.requests_out.append(route.request.url)
        route.abort()

    context.route("**/*", request)
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    try:
        page.goto(address, wait_until="load")
        yield page
    finally: context.close()

def set_theme(page, scheme):
    "Show an open page in another theme; furo's is an attribute of the body."
    page.emulate_media(color_scheme=scheme)
    page.evaluate(
        "s => { if (document.body.dataset.theme) document.body.dataset.theme = s; }", scheme
    )

def overflow(page):
    "By how many pixels a page is wider than its window, and what reaches out."
    return page.evaluate("""() => {
      const root = document.documentElement, over = root.scrollWidth - root.clientWidth;
      if (over <= 0) return null;
      const scrolls = (e) => {
        for (let up = e.parentElement; up && up !== document.body; up = up.parentElement)
          if (getComputedStyle(up).overflowX !== "visible") return true;
        return false;
      };
      const wide = [...document.querySelectorAll("body *")].filter((e) =>
        e.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(e));
      const name = (e) => `${e.tagName.toLowerCase()}.${e.getAttribute("class") || ""}`;
      return {pixels: over, elements: wide.slice(-5).map(name)};
    }""")

def problems(page):
    "What must be wrong with no page: it scrolls sideways, has errors, or asks other machines."
    found = []
    if over := overflow(page): found.append(f"wider than its window: {over}")
    found += [f"error: {text}" for text in page.errors]
    found += [f"asks for {address}" for address in page.requests_out]
    return found

def contrast_offenders(page, root="body", least=4.5):
    """Texts in `root`, a CSS selector, with less than `least` contrast to their background, each as
    `{text, tag, class, id, color, background, ratio}`. Folded parts are opened before."""
    page.evaluate("() => document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    found = page.evaluate(CONTRAST, [root, least])
    return found["offenders"]

def texts_measured(page, root="body"):
    "How many texts of a page `contrast_offenders` sees."
    return page.evaluate(CONTRAST, [root, 1])["number"]
