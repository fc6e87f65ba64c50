"""Text of HTML and XML documents, as a reader would see it."""

import html.parser
import re

_HIDDEN = frozenset({"aside", "button", "footer", "head", "header", "info", "nav", "script", "style", "svg"})
_HIDDEN_CLASSES = frozenset({  # what documentation generators call their navigation
    "docnav", "editsection", "headerlink", "navfooter", "navheader", "printfooter", "related", "sphinxsidebar",
    "t-navbar", "toc",
})  # fmt: skip
_WITHOUT_END = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "wbr"})
_BLOCKS = frozenset({
    "article", "blockquote", "br", "caption", "code-block", "dd", "div", "dl", "dt", "fieldset", "figure", "form", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "item", "li", "list", "main", "note", "ol", "p", "page", "pre", "section",
    "steps", "table", "title", "tr", "ul",
})  # fmt: skip
_PREFORMATTED = frozenset({"pre", "screen", "textarea", "code-block"})
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?([A-Za-z0-9_-]+)")


def is_markup(data: bytes) -> bool:
    """Tells whether bytes look like an HTML or XML document."""
    return data[:200].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<page"))


def html_to_text(markup: str) -> str:
    """Gives the text of an HTML or XML document: blocks on lines of their own, white space kept in <pre> alone.

    Navigation, scripts and styles are left out.
    """
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    text = "".join(reader.pieces)
    return re.sub(r"[ \t]*\n\s*\n", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def decode(data: bytes) -> str | None:
    """Decodes UTF-8, or what an HTML document's charset names; None if it is neither."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        named = _CHARSET.search(data[:2000])
    if named is None:
        return None
    try:
        return data.decode(named.group(1).decode("ascii"))
    except (LookupError, UnicodeDecodeError):
        return None


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces = []
        self._hidden_by = None  # the element that hides everything up to its end
        self._depth = 0
        self._num_preformatted = 0

    def handle_starttag(self, tag, attributes):
        if self._hidden_by is not None:
            self._depth += tag == self._hidden_by
        elif _is_hidden(tag, attributes):
            self._hidden_by, self._depth = tag, 1
        else:
            self._num_preformatted += tag in _PREFORMATTED
            if tag in ("td", "th"):
                self.pieces.append(" ")
            elif tag in _BLOCKS:
                self.pieces.append("\n\n" if tag in ("p", "pre", "section") or tag[0] == "h" else "\n")

    def handle_endtag(self, tag):
        if self._hidden_by is not None:
            self._depth -= tag == self._hidden_by
            if not self._depth:
                self._hidden_by = None
        else:
            self._num_preformatted -= tag in _PREFORMATTED and self._num_preformatted > 0
            if tag in _BLOCKS:
                self.pieces.append("\n")

    def handle_startendtag(self, tag, attributes):
        if self._hidden_by is None and tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data):
        if self._hidden_by is not None:
            return
        if not self._num_preformatted:
            data = re.sub(r"\s+", " ", data)
            if self.pieces and self.pieces[-1].endswith(("\n", " ")):
                data = data.removeprefix(" ")
        if data:
            self.pieces.append(data)


def _is_hidden(tag: str, attributes: list[tuple[str, str | None]]) -> bool:
    classes = (dict(attributes).get("class") or "").split()
    return tag in _HIDDEN or (tag not in _WITHOUT_END and not _HIDDEN_CLASSES.isdisjoint(classes))
