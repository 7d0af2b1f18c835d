"""Ledgers and helpers that the tests of reports share. Gaussians alone are accounted in closed form: quick."""

from __future__ import annotations

from html.parser import HTMLParser

from privet.accounting import GaussianEvent, Ledger, PoissonEvent, Relation

VOID = {"meta", "br", "hr", "img", "input", "link"}
AUDIT = {
    "kind": "one run",
    "lower_bound": 0.5,
    "claimed": 3.0,
    "delta": 1e-5,
    "confidence": 0.95,
    "canaries": 1000,
    "seconds": 12.5,
    "version": "0.1.0",
}


def quick_ledger(marks=()):
    """Returns a ledger of Gaussians, whose noise changes once."""
    ledger = Ledger(relation=Relation.ZERO_OUT)
    ledger.begin(GaussianEvent(8.0), 3)
    ledger.begin(GaussianEvent(16.0), 5)
    for mark in marks:
        ledger.mark(mark)
    return ledger


def sampled_ledger(accountant="pld"):
    """Returns a ledger of sampled steps."""
    ledger = Ledger(relation=Relation.ZERO_OUT, accountant=accountant)
    ledger.begin(PoissonEvent(0.01, GaussianEvent(1.0)), 200)
    return ledger


class Elements(HTMLParser):
    """Reads a page strictly: every element that opens has to close, in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.names, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
