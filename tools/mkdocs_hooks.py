"""The site has the pages of the studies, which lie beside their data, and reads docstrings."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FIGURES = Path(__file__).parent.parent / "figures"
_NAV = "Studies"  # the entry of mkdocs.yml that gets a page for each


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every study in the navigation, below its overview."""
    names = sorted(path.stem for path in FIGURES.glob("*.md") if path.name != "README.md")
    for section in config.nav or []:
        for items in section.values():
            for item in items if isinstance(items, list) else []:
                if _NAV in item:
                    pages = [{name: f"studies/{name}.md"} for name in names]
                    item[_NAV] = [{"Overview": item[_NAV]}, *pages]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add ``figures/*.md`` and their drawings as ``studies/``."""
    for path in sorted(FIGURES.iterdir()):
        if path.suffix in (".md", ".svg"):
            name = f"studies/{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name objects as Sphinx does (``:func:`~eigenlens.freeze```): leave the names."""
    return re.sub(r":(?:func|class|meth|mod|data|attr):<code>~?", "<code>", html)
