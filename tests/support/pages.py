"""Pages in one file, and tables."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any


def read_page(path: Path) -> tuple[str, dict[str, Any]]:
    """The markup of a page, which must ask the network for nothing, without its scripts; and the scripts' data."""
    text = path.read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    page = text.replace(data, "")
    assert not re.search(r"https?:|//|@import|url\(", page) and "default-src 'none'" in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(link|iframe|object|embed)\b|<[^>]*\b(src|href|srcset|action)=", markup)
    return markup, json.loads(data)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
