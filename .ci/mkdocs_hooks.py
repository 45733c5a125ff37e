"""Links that leave docs/ work in the repository and not on the site: there the path is named instead."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", r"\1 (`\2`)", markdown)
