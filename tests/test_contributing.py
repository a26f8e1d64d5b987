"CONTRIBUTING.md names notebooks, tests and `make` targets that there are."

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build

def test_names_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stems = {path.stem for path in build.notebooks()}
    named = set(re.findall(r"`(?:NB=)?(\d\d\w?_\w+)`|NB=(\d\d\w?_\w+)", text))
    gone = {name for pair in named for name in pair if name} - stems
    assert len(named) > 9 and not gone, f"no such notebook: {gone}"
    code = "\n".join(source for path in build.notebooks() for source in build.code_cells(path))
    quoted = {name for name in re.findall(r"`([A-Za-z_]+)`", text) if "_" in name.strip("_")}
    words = set(re.findall(r"\w+", code)) | {"vlm_lit", "some_name", "test_some_name"}
    assert not quoted - words, f"in no notebook: {quoted - words}"
    targets = set(
        re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    )
    assert set(re.findall(r"`make (\w+)", text)) <= targets
