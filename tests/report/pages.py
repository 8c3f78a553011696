"""Reads an HTML page the way a test needs it."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "rect", "path", "use", "line", "circle", "hr", "input"}


class Page(HTMLParser):
    """Elements, visible text and headings of a page. ``elements``: (tag, attributes) in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self._pieces: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    @property
    def text(self) -> str:
        """All text outside style and script, with single spaces."""
        return " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self._pieces.append(data)
        if {"h1", "h2", "h3"} & set(self._open):
            self.headings[-1] += data

    def with_class(self, name: str) -> list[dict[str, str]]:
        """Attributes of the elements of that class."""
        return [a for _, a in self.elements if name in a.get("class", "").split()]

    def addresses(self) -> list[str]:
        """Everything an element refers to."""
        names = ("src", "href", "xlink:href", "action", "data", "poster", "srcset", "formaction")
        return [a[n] for _, a in self.elements for n in names if n in a]
