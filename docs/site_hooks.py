"""What mkdocs adds to the site: pages that are generated, and files from outside `docs/` that its pages link to.

Links are written for readers of the repository. Here those that leave `docs/` are changed to where the site has the
file.
"""

import logging
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from settings_reference import settings_page  # noqa: E402

_FROM_ELSEWHERE = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')
_CODE_IN_TABLE = re.compile(r"^\|.*`[^`\n]*\\\|[^`\n]*`.*$", re.MULTILINE)
_log = logging.getLogger("mkdocs.hooks")
LINKED = ("benchmarks/results/**/*.md", "benchmarks/results/**/*.svg", "benchmarks/results/**/*.jsonl", "examples/*")
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "reporting.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the settings page, the pages of the root folder, and what pages link to outside `docs/`."""
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, target in ROOT_PAGES.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    for pattern in LINKED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and name != "examples/README.md":
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links to files that are beside `docs/` in the repository and inside it on the site.

    In tables, GitHub needs a backslash before a pipe in code, and Python-Markdown would show it.
    """
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+(benchmarks|examples)/", rf"]({up}\1/", markdown)
    for name, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{re.escape(name)}", f"]({up}{target}", markdown)
    return _CODE_IN_TABLE.sub(lambda line: line[0].replace("\\|", "|"), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Warn, which ends a strict build, if a page loads anything from elsewhere."""
    found = _FROM_ELSEWHERE.search(output)
    if found:
        _log.warning("%s loads %s; the site has to work offline", page.file.src_uri, found[0])
