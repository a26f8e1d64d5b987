"""The documentation site: every notebook with its stored outputs, and a page of the public names.

    python tools/docs.py             make _docs/html and check its links
    python tools/docs.py --check     only check the links of _docs/html

Notebooks are copied to _docs/source without their hidden cells and without directives, with links
to Colab and to the source; Sphinx makes pages of them and runs nothing. A warning is an error, and
so are a link or an anchor that leads nowhere and anything that would be loaded from elsewhere.
"""

import argparse, json, re, shutil, sys, time
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api_pages
import build

DOCS, OUT = build.ROOT / "docs", build.ROOT / "_docs"
SOURCE, HTML = OUT / "source", OUT / "html"
PATH = [
    *("walkthrough", "walkthrough_step", "02_tokenizer", "03_templates", "04_sentinels"),
    *("05_labels", "06_images", "08e_mining", "09b_model", "17_trainer", "own_data", "alignment"),
]
CHINESE = re.compile(r"[._]zh$")
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src"}
SHOWN = {  # words after `#|` -> class of the cell
    "export": "exported",
    "exporti": "exported",
    "test": "test",
}

def settings():
    "What settings.ini says."
    config = ConfigParser(delimiters=["="])
    config.read(build.ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]

def blob(path):
    "Address of a file of the repository."
    values = settings()
    kind = "tree" if (build.ROOT / path).is_dir() else "blob"
    return f"{values['git_url']}/{kind}/{values['branch']}/{path}"

def colab(path):
    "Address that opens a notebook in Colab."
    values = settings()
    repository = urlsplit(values["git_url"]).path.strip("/")
    base = "https://colab.research.google.com/github"
    return f"{base}/{repository}/blob/{values['branch']}/{path}"

# --- notebooks ---

def split_directives(source):
    "Words of the lines `#| ...` at the top of a cell, and the rest."
    lines, words = source.splitlines(), []
    while lines and (lines[0].startswith("#|") or not lines[0].strip()):
        words += lines.pop(0)[2:].split()[:1]
    return words, "\n".join(lines).rstrip()

class BrokenLink(Exception):
    "A link of a notebook to a file that is not there."

def local_file(target):
    "A file of the repository, by a path that is relative to nbs/; None outside of it."
    path = (build.NBS / unquote(target)).resolve()
    return path.relative_to(build.ROOT) if path.is_relative_to(build.ROOT) else None

def new_target(target, is_image, is_html):
    "Where a link of a notebook leads on the site."
    parts = urlsplit(target)
    if parts.scheme or not parts.path: return target
    path = local_file(parts.path)
    if path is None or not (build.ROOT / path).exists():
        raise BrokenLink(f"no file {target}")
    if path.suffix == ".ipynb" and path.parent == Path("nbs"):
        suffix = ".html" if is_html else ".ipynb"
        return path.stem + suffix + (f"#{parts.fragment}" if parts.fragment else "")
    if not is_image: return blob(path.as_posix())
    copy = SOURCE / "extra/media" / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(build.ROOT / path, copy)
    return f"media/{path.name}"

def markdown(text):
    "A Markdown cell for the site. An image from elsewhere becomes a link: the site loads nothing."

    def image(match):
        alt, target = match.groups()
        if urlsplit(target).scheme in ("http", "https"):
            return f"[{alt}]({target})"
        return f'<img alt="{alt}" src="{target}">'

    def link(match): return f"]({new_target(match[1], False, False)}"

    def attribute(match):
        name, target = match.groups()
        return f'{name}="{new_target(target, name != "href", True)}"'

    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.M | re.S)
    for n in range(0, len(parts), 2):
        part = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", image, parts[n])
        part = re.sub(r"\]\(([^)\s]+)", link, part)
        parts[n] = re.sub(r'\b(href|src|srcset)="([^"]+)"', attribute, part)
    return "".join(parts)

def links_line(path, module):
    "The line below a notebook's title."
    name = path.relative_to(build.ROOT).as_posix()
    is_chinese = CHINESE.search(path.stem)
    words = ("在 Colab 中打开", "源文件") if is_chinese else ("Open in Colab", "Source")
    parts = [f'<a href="{colab(name)}">{words[0]}</a>', f'<a href="{blob(name)}">{words[1]}</a>']
    if module:
        name, room = f"<code>vlm_lit.{module}</code>", api_pages.caption(module)
        has_page = room in api_pages.rooms_of_names()
        page = f"{api_pages.page_of(room)}.html"
        parts.append(f'<a href="{page}">{name}</a>' if has_page else name)
    return f'<p class="notebook-links">{" ".join(parts)}</p>'

def alt_text(source):
    "What a cell's code says of its image: its argument `alt`, or the comment in its first line."
    if match := re.search(r"""\balt\s*=\s*(["'])(.+?)\1""", source):
        return match[2]
    if match := re.match(r"# (.+)", source): return match[1]
    return "image that the code above shows"

def code_cell(cell, stem):
    "A code cell for the site, or None where nothing of it is shown."
    words, source = split_directives(cell["source"])
    if "hide" in words: return None
    outputs = [] if "hide_output" in words else cell["outputs"]
    if stem == "index":
        outputs = [o for o in outputs if o.get("name") != "stderr"]
    if not source and not outputs: return None
    tags = sorted({SHOWN[word] for word in words if word in SHOWN})
    if "hide_input" in words: tags.append("remove-input")
    metadata = {"tags": tags}
    if any(key.startswith("image/") for o in outputs for key in o.get("data", {})):
        metadata["mystnb"] = {"image": {"alt": alt_text(source)}}
    return {**cell, "source": source, "outputs": outputs, "metadata": metadata}

def page(path):
    "A notebook as the site shows it."
    nb = json.loads(path.read_text(encoding="utf-8"))
    module, cells, has_links = None, [], False
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
        if match := re.search(r"^#\|\s*default_exp ([\w.]+)", cell["source"], re.M):
            module = module or match[1]
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            shown = code_cell(cell, path.stem)
            if shown is None: continue
            target = f"({path.stem}-{cell['id']})=\n"
            cells += [new_cell("markdown", target, f"t{cell['id']}"), shown]
            continue
        if cell["cell_type"] != "markdown" or cell["source"].startswith("#| hide"):
            continue
        cell["source"] = markdown(cell["source"])
        title = re.match(r"# .*\n?", cell["source"])
        if title and not has_links and path.stem != "index":
            line, rest = links_line(path, module), cell["source"][title.end() :]
            cell["source"] = f"{title[0].rstrip()}\n\n{line}\n\n{rest}"
            has_links = True
        cells.append(cell)
    language = {"name": "python", "pygments_lexer": "ipython3"}
    return {**nb, "cells": cells, "metadata": {**nb["metadata"], "language_info": language}}

def new_cell(kind, source, name):
    "A cell that no notebook has."
    return {"cell_type": kind, "id": name, "metadata": {}, "source": source}

# --- navigation ---

def room_of(path):
    "Caption of the room that a notebook's module is in; None when it exports nothing."
    for source in build.code_cells(path):
        if "default_exp" in build.directives(source):
            return api_pages.caption(build.directives(source)["default_exp"])
    return None

def navigation(paths):
    "`{caption: stems}` of all notebooks but the index."
    stems = {path.stem: path for path in paths}
    found = {"The path": [stem for stem in PATH if stem in stems]}
    rooms, guides, appendices, chinese = {room: [] for room in api_pages.ROOMS}, [], [], []
    for stem, path in sorted(stems.items()):
        if stem == "index" or stem in found["The path"]: continue
        if CHINESE.search(stem): chinese.append(stem)
        elif re.match(r"9\d", stem): appendices.append(stem)
        elif room := room_of(path): rooms.setdefault(room, []).append(stem)
        else: guides.append(stem)
    found |= {"Guides": guides, **rooms, "Appendices": appendices, "中文": chinese}
    return {text: members for text, members in found.items() if members}

def toctrees(groups):
    "The navigation as Markdown, for the end of the first page."
    groups = {**groups, "Reference": ["api/index"]}
    out = ""
    for text, members in groups.items():
        own = ["Home <self>"] if text == "The path" else []
        lines = "\n".join([*own, *members])
        out += f"```{{toctree}}\n:hidden:\n:caption: {text}\n\n{lines}\n```\n\n"
    return out

def prepare():
    "Write _docs/source anew; returns how many notebooks it holds."
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / "api").mkdir(parents=True)
    (SOURCE / "extra").mkdir()
    paths = sorted(build.NBS.glob("*.ipynb"))
    trouble = []
    for path in paths:
        try: nb = page(path)
        except BrokenLink as e:
            trouble.append(f"{path.name}: {e}")
            continue
        if path.stem == "index":
            nb["cells"].append(new_cell("markdown", toctrees(navigation(paths)), "navigation"))
        text = json.dumps(nb, ensure_ascii=False)
        (SOURCE / path.name).write_text(text, encoding="utf-8")
    if trouble: raise SystemExit("\n".join(trouble))
    for name, text in api_pages.pages().items():
        (SOURCE / name).write_text(text, encoding="utf-8")
    return len(paths)

def make_html():
    "Run Sphinx; returns its exit code, 1 after any warning."
    from sphinx.cmd.build import main

    shutil.rmtree(HTML, ignore_errors=True)
    quiet = ["--quiet", "--fail-on-warning", "--keep-going", "--fresh-env"]
    places = ["-c", DOCS, "-d", OUT / "doctrees", SOURCE, HTML]
    return main([*quiet, "-j", "auto", *map(str, places)])

# --- the check ---

class Page(HTMLParser):
    "What a page links to, what it loads, and what can be linked to in it."

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag == "link" and attrs.get("href"):
            is_loaded = attrs.get("rel") in ("stylesheet", "icon", "preload", "shortcut icon")
            (self.loads if is_loaded else self.links).append(attrs["href"])
        if attrs.get(LOADED.get(tag, "")):
            self.loads.append(attrs[LOADED[tag]])
        if attrs.get("srcset"):
            self.loads += [part.split()[0] for part in attrs["srcset"].split(",")]

    handle_startendtag = handle_starttag

def broken(folder):
    "What is wrong with the links of the pages in a folder, a line each."
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for target in page.loads:
            parts = urlsplit(target or "")
            if parts.scheme == "data": continue
            if parts.scheme or parts.netloc:
                found.append(f"{name}: loads {target}")
            elif not (path.parent / unquote(parts.path)).is_file():
                found.append(f"{name}: no file {target}")
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc: continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not to.is_file(): found.append(f"{name}: no page {target}")
            elif to.suffix == ".html" and to in pages:
                if unquote(parts.fragment) not in pages[to].anchors:
                    found.append(f"{name}: no anchor {target}")
    for path in sorted(folder.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"""(?:url\(|@import\s+)["']?(https?:[^"')]+)""", text):
            found.append(f"{path.relative_to(folder)}: loads {target}")
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check the links")
    args = parser.parse_args()
    began, code, html = time.time(), 0, HTML.resolve()
    if not args.check:
        number = prepare()
        code = make_html()
        print(f"{number} notebooks in {time.time() - began:.0f} s", flush=True)
    if not (html / "index.html").is_file():
        raise SystemExit("no site: run `make docs`")
    trouble = broken(html)
    print("\n".join([*trouble, f"{len(trouble)} broken links"]))
    if not trouble and not code:
        print(f"open {(HTML / 'index.html').relative_to(build.ROOT)}")
    sys.exit(bool(code or trouble))

if __name__ == "__main__": main()
