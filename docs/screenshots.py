"""Images of the site for the README: what `make docs` has built, in Chromium, at twice the pixels.

    python docs/screenshots.py [FOLDER]    docs/images when left out

Three PNG files of less than 200 kB: the first stop of the walk, a label strip, the first page.
"""

import io, sys
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/browser"))
from pages import browser, open_page, served

LARGEST = 200_000  # bytes
MARGIN = 24  # pixels
COLORS = 256, 128, 64, 32

def compressed(png, is_whole):
    "The image with as many colors of a palette as fit into `LARGEST` bytes."
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if not is_whole: image = trimmed(image)
    for n in COLORS:
        out = io.BytesIO()
        image.quantize(n, dither=Image.Dither.NONE).save(out, "png", optimize=True)
        if out.tell() < LARGEST: return out.getvalue()
    raise SystemExit(f"with {n} colors an image still takes {out.tell()} bytes")

def trimmed(image):
    "The image without its empty margins, and a small one instead."
    paper = image.getpixel((image.width - 1, 0))
    box = ImageChops.difference(image, Image.new("RGB", image.size, paper)).getbbox()
    return ImageOps.expand(image.crop(box), MARGIN, paper)

def first_cell(page, call):
    "The first cell with an output whose code holds `call`."
    cells = page.locator("div.cell").filter(has=page.locator(".cell_output"))
    cells = cells.filter(has=page.locator(".cell_input", has_text=call))
    if not cells.count():
        raise SystemExit(f"{page.url}: no output of a cell with {call}")
    return cells.first

def main():
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs/images"
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as chromium, served(ROOT / "_docs/html") as site:

        def save(name, png, is_whole=False):
            data = compressed(png, is_whole)
            (folder / name).write_bytes(data)
            print(f"{name}: {Image.open(io.BytesIO(data)).size}, {len(data) / 1000:.0f} kB")

        def cell(name, stem, call, part):
            with open_page(chromium, f"{site}/{stem}.html", width=1280, scale=2) as page:
                found = first_cell(page, call)
                save(name, (found.locator(part).first if part else found).screenshot())

        cell("stop.png", "walkthrough", "with Breakpoint(", "")
        cell("labels.png", "05_labels", "LabelStrip(", ".cell_output .text_html")
        look = dict(width=1280, height=800, scheme="dark", scale=2)
        with open_page(chromium, f"{site}/index.html", **look) as page:
            save("site-dark.png", page.screenshot(), is_whole=True)

if __name__ == "__main__": main()
