"""Scripts of the examples, made from their notebooks.

    python tools/examples.py export            examples/*/*.ipynb -> the script beside each
    python tools/examples.py run [NAME ...]    execute notebooks in place and clean them
    python tools/examples.py check             exit with 1 if a script is not what its notebook says

nbdev looks into nbs/ only. Here `#| default_exp prepare` names the script, cells marked
`#| export` make its body, and a function `main` is called when the script is run.
"""

import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build import ROOT, body, code_cells, directives

EXAMPLES = ROOT / "examples"

def notebooks(names=()):
    "Paths of the examples' notebooks, or only those named."
    found = sorted(EXAMPLES.glob("*/*.ipynb"))
    return [p for p in found if not names or p.stem in names]

def script(path):
    "Path and text of the script that a notebook exports; None when it exports none."
    cells = code_cells(path)
    names = [directives(c)["default_exp"] for c in cells if "default_exp" in directives(c)]
    if not names: return None
    parts = [body(c) for c in cells if "export" in directives(c)]
    if any(line.startswith("def main(") for part in parts for line in part.splitlines()):
        parts.append('if __name__ == "__main__": main()')
    return path.parent / f"{names[0]}.py", "\n\n".join(parts) + "\n"

def scripts():
    "All scripts: `{path: text}`."
    return dict(found for found in map(script, notebooks()) if found)

def stale():
    "Scripts that are missing or not what their notebooks say."
    return [
        path
        for path, text in scripts().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]

def export():
    "Write the scripts."
    for path, text in scripts().items():
        path.write_text(text, encoding="utf-8")

def run(names=()):
    "Execute notebooks in place, top to bottom, each in its own folder."
    import nbformat
    from nbclient import NotebookClient

    for path in notebooks(names):
        print(f"running {path.relative_to(ROOT)}", flush=True)
        nb = nbformat.read(path, as_version=4)
        nb.metadata = {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        }
        client = NotebookClient(
            nb,
            timeout=900,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute()
        for n, cell in enumerate(nb.cells):
            cell.id, cell.metadata = f"c{n:03d}", {}
            if cell.cell_type != "code": continue
            cell.execution_count = None
            for output in cell.outputs:
                output.get("metadata", {}).clear()
                if "execution_count" in output: output.execution_count = None
        nbformat.write(nb, path)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["export", "run", "check"])
    parser.add_argument("names", nargs="*", help="notebooks to run, by stem; all when left out")
    args = parser.parse_args()
    if args.what == "export": export()
    if args.what == "run": run(args.names)
    if args.what == "check" and (found := stale()):
        raise SystemExit(
            "run python tools/examples.py export; not up to date: "
            + ", ".join(str(p.relative_to(ROOT)) for p in found)
        )

if __name__ == "__main__": main()
