"""Checks of a report's page: it parses, escapes, stands alone, and can be read without seeing it."""

import re
from html.parser import HTMLParser

HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"


class Page(HTMLParser):
    """Checks nesting and collects ids, links and elements."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.references, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.references += [(k, v) for k, v in attrs if k in {"src", "href", "xlink:href", "srcset", "action"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(page, *, hostile=True):
    """Parses, escapes, stands alone, and can be read without seeing it. `hostile` texts must be on it, as text."""
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert not {"script", "iframe", "img", "link"} & set(parser.tags)
    assert all(value.startswith("#") and value[1:] in parser.ids for _, value in parser.references)
    for found in re.findall(r"url\(#([^)]+)\)", page):
        assert found in parser.ids
    assert HOSTILE not in page
    assert (HOSTILE in "".join(parser.text)) == hostile
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces.replace("no HTTP", "")
    assert "@import" not in page
    assert "#0102" not in page  # every stand-in colour was replaced
    assert page.count("<svg") == page.count('role="img"') == page.count("<desc id=")
