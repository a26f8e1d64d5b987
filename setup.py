"Package metadata, read from settings.ini so that it is written once."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

class Build(build_py):
    "All modules but nbdev's index of names, which only the notebooks' tools read."

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] != "_modidx"]

def extras():
    "Requirements of each extra."
    names = [key for key in cfg if key.startswith("extra_")]
    own = {key.removeprefix("extra_").replace("_", "-"): cfg[key].split() for key in names}
    return {"dev": cfg["dev_requirements"].split(), **own}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["vlm_lit", "vlm_lit.*"]),
    package_data={
        "vlm_lit": ["py.typed", "assets/*.html", "assets/*.json.xz", "assets/presets/*.json"]
    },
    include_package_data=False,
    cmdclass={"build_py": Build},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras(),
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "lmms_eval.models": cfg["lmms_eval_models"].split(),
    },
)
