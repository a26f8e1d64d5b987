"What is handed on: the wheel holds the package and its data, the repository no pickle."

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "py.typed",
    "assets/gemma_tokenizer.json.xz",
    "assets/walk.html",
    *(f"assets/presets/{name}.json" for name in "gemma3-270m llava-7b mgm-2b smol tiny".split()),
}
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what setuptools reads, a stray file among it."
    folder = tmp_path_factory.mktemp("wheel")
    for name in "setup.py pyproject.toml settings.ini MANIFEST.in README.md LICENSE NOTICE".split():
        shutil.copy(ROOT / name, folder)
    skipped = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "vlm_lit", folder / "vlm_lit", ignore=skipped)
    (folder / "vlm_lit/assets/result.json").write_text("{}")
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(path)

def test_wheel_holds_modules_and_listed_data(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"vlm_lit"}
    inside = {name.removeprefix("vlm_lit/") for name in names}
    assert {name for name in inside if not name.endswith(".py")} == DATA
    ours = {p.relative_to(ROOT / "vlm_lit").as_posix() for p in (ROOT / "vlm_lit").rglob("*.py")}
    assert {name for name in inside if name.endswith(".py")} == ours - {"_modidx.py"}
    assert sum(item.file_size for item in wheel.infolist()) < 4.5e6

def test_wheel_names_its_licenses_and_command(wheel):
    about = {name.partition(".dist-info/")[2]: name for name in wheel.namelist()}
    assert {"licenses/LICENSE", "licenses/NOTICE"} <= set(about)
    command = wheel.read(about["entry_points.txt"]).decode()
    assert "vlm-lit = vlm_lit.__main__:main" in command
    adapter = "[lmms_eval.models]\nvlm_lit = vlm_lit.evaluation.lmms_eval_adapter:manifest"
    assert adapter in command
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = wheel.read(about["METADATA"]).decode().splitlines()
    required = {line for line in lines if line.startswith("Requires-Dist") and "extra" not in line}
    assert len(required) == len(config["DEFAULT"]["requirements"].split())

def test_repository_holds_no_pickle():
    if not (ROOT / ".git").exists(): pytest.skip("no git checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [name for name in done.stdout.split() if Path(name).suffix in PICKLES]
    assert not found, f"keep tensors as safetensors: {found}"
