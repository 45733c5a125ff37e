"""Links that leave docs/ work in the repository and not on the site: there the path is named instead."""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.hooks")  # a warning of mkdocs fails a strict build


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    source = Path(page.file.abs_src_path)

    def named(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        if not target.exists():
            log.warning(f"{source.name} links to {link[2]}, which is not in the repository")
        return f"{link[1]} (`{target.relative_to(ROOT)}`)"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)", named, markdown)
