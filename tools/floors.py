"""The oldest versions that settings.ini promises to work with.

python tools/floors.py            print them as pip's constraints: torch==2.8, ...
python tools/floors.py --check    exit with 1 unless exactly these are installed
"""

import re
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent.parent / "settings.ini"

def floors():
    "`{name: oldest version}` of requirements, and of extras that give one."
    config = ConfigParser(delimiters=["="])
    config.read(SETTINGS, encoding="utf-8")
    values = config["DEFAULT"]
    wanted = values["requirements"].split()
    for key in values:
        if key.startswith("extra_"): wanted += values[key].split()
    found = [re.match(r"([\w.-]+)>=([\d.]+)", requirement) for requirement in wanted]
    return {match[1]: match[2] for match in found if match}

def same(installed, floor):
    "Whether two versions are equal, zeros at the end and a build's tag (+cpu) left out."
    parts = [re.sub(r"(\.0)*$", "", text.split("+")[0]) for text in (installed, floor)]
    return parts[0] == parts[1]

def main():
    if "--check" not in sys.argv:
        print("\n".join(f"{name}=={floor}" for name, floor in floors().items()))
        return
    config = ConfigParser(delimiters=["="])
    config.read(SETTINGS, encoding="utf-8")
    needed = {re.split("[<>=]", r)[0] for r in config["DEFAULT"]["requirements"].split()}
    have = {name: version(name) for name in needed}
    wrong = {n: v for n, v in have.items() if not same(v, floors()[n])}
    if wrong: raise SystemExit(f"not the oldest versions: {wrong}")

if __name__ == "__main__": main()
