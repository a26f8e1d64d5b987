"Package metadata, read from settings.ini so that it is written once."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["vlm_lit", "vlm_lit.*"]), package_data={"vlm_lit": ["assets/*", "assets/presets/*"]}, license_files=["LICENSE", "NOTICE"],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), **{key.removeprefix("extra_").replace("_", "-"): value.split() for key,value in cfg.items() if key.startswith("extra_")}},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
