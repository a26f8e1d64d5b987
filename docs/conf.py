"""Sphinx's settings; `python tools/docs.py` prepares the pages and calls Sphinx."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
config = ConfigParser(delimiters=["="])
config.read(HERE.parent / "settings.ini", encoding="utf-8")
values = config["DEFAULT"]

project = values["title"]
author = values["author"]
copyright = values["copyright"]
release = version = values["version"]
language = "en"

extensions = ["myst_nb"]
exclude_patterns = ["extra"]
nb_execution_mode = "off"  # outputs are those that are stored
nb_merge_streams = True
nb_ipywidgets_js = {}  # they would come from elsewhere
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]
maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = values["title"]
html_baseurl = f"{values['doc_host']}{values['doc_baseurl']}/"
html_static_path = [str(HERE / "static")]
html_extra_path = ["../_docs/source/extra"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "navigation_with_keys": False,
    "footer_icons": [],
    "top_of_page_buttons": [],
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

def language_of_page(app, name, template, context, doctree):
    "Chinese pages say so."
    if name.endswith((".zh", "_zh")): context["language"] = "zh"

def setup(app):
    from both_languages import EnglishAndChinese

    app.add_search_language(EnglishAndChinese)
    app.connect("html-page-context", language_of_page)
