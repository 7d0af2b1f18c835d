"""From facts to a document: which sections a report has, in which order, words before numbers."""

from __future__ import annotations

import math

from privet.report.described import described, holds_selection
from privet.report.document import Block, Bullets, Document, Paragraph, Section, Table
from privet.report.facts import Facts
from privet.report.hazards import REPRODUCIBLE, Status, hazards
from privet.report.pictures import attacks_picture, curve_picture, schedule_pictures
from privet.report.words import (
    in_plain_words,
    mark_in_words,
    number,
    relation_in_words,
    unit_in_words,
    warnings,
)

__all__ = ["document_of"]

_MOST_PHASES = 12  # shown as rows; a schedule may have thousands
_STATUS = {Status.LIBRARY: "handled by the library", Status.USER: "declared by the user", Status.OPEN: "open"}


def document_of(facts: Facts) -> Document:
    """Returns the report as a document."""
    sections = (
        _promise(facts),
        _parties(facts),
        _ran(facts),
        _accounting(facts),
        _attacks(facts),
        _covered(facts),
        _threats(facts),
        _record(facts),
        _audits(facts),
        _hazards(facts),
        _verify(facts),
    )
    headline = (
        ("ε", number(facts.epsilon.upper)),
        ("δ", f"{facts.delta:g}"),
        ("unit", f"one {facts.unit}"),
        ("neighbors", facts.relation.replace("_", " ")),
    )
    return Document("Privacy report", headline, sections)


def _promise(facts: Facts) -> Section:
    blocks: list[Block] = [Paragraph(text, strong=True) for text in warnings(facts)]
    blocks += [Paragraph(text) for text in in_plain_words(facts)]
    if facts.note is not None:
        blocks.append(Paragraph(f"Note of the author: {facts.note}"))
    return Section("In plain words", tuple(blocks))


def _parties(facts: Facts) -> Section:
    size = "not given" if facts.dataset_size is None else str(facts.dataset_size)
    rows = (
        ("Unit of privacy", unit_in_words(facts)),
        ("Neighboring relation", f"{facts.relation.replace('_', ' ')}: {relation_in_words(facts)}"),
        ("Setting", "central: one party holds the data, trains, and adds the noise"),
        ("Number of records", size),
    )
    return Section("Who is protected", (Table(("", ""), rows),))


def _ran(facts: Facts) -> Section:
    words = [described(phase.event) for phase in facts.phases]
    rows = tuple(
        (str(index), str(phase.count), each.name, _or_dash(each.rate), _or_dash(each.noise_multiplier))
        for index, (phase, each) in enumerate(zip(facts.phases[:_MOST_PHASES], words, strict=False), 1)
    )
    first = {each.name: f"{each.sampler}; released is {each.mechanism}." for each in reversed(words)}
    noun = "phase" if len(facts.phases) == 1 else "phases"
    blocks: list[Block] = [
        Paragraph(
            f"On record: {facts.steps} begun, each of them a step, a pass of a partition, or a whole selection, in "
            f"{len(facts.phases)} {noun}. Each has the sampler that drew its batches and the noise that it got. The "
            "first phase with each sampler, in words:"
        ),
        Bullets(tuple(text[0].upper() + text[1:] for text in reversed(first.values()))),
        Table(("phase", "count", "sampler", "sampling rate", "noise multiplier"), rows),
    ]
    if len(facts.phases) > _MOST_PHASES:
        blocks.append(
            Paragraph(f"The other {len(facts.phases) - _MOST_PHASES} phases are in the JSON form of this report.")
        )
    blocks += schedule_pictures(facts)
    clip = facts.declarations.get("clip_norm")
    blocks.append(
        Paragraph(
            "The clip norm is not in a ledger, because ε does not depend on it: noise is scaled by the sensitivity of "
            f"each sum. {'It was not declared.' if clip is None else f'Declared: {clip}'}"
        )
    )
    return Section("What ran", tuple(blocks))


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _accounting(facts: Facts) -> Section:
    bound = facts.epsilon
    below = "no lower bound is known" if bound.lower == 0.0 else f"at least {number(bound.lower, up=False, digits=6)}"
    rows = [
        ("ε, upper bound", number(bound.upper, digits=6)),
        ("ε, lower bound", below),
        ("δ", f"{facts.delta:g}"),
        ("Accountant", f"{facts.accountant}; the upper bound by {bound.method}"),
        ("Numerical error", _gap(facts)),
        (
            "μ of the Gaussian that covers the curve",
            f"{number(facts.mu)}, for every δ down to {facts.smallest_delta:g}",
        ),
    ]
    rows += [("Note of the accountant", note) for note in bound.notes]
    curve = Table(("δ", "ε at most"), tuple((f"{delta:g}", number(each)) for delta, each in facts.curve))
    return Section("Accounting", (Table(("", ""), tuple(rows)), *curve_picture(facts), curve))


def _gap(facts: Facts) -> str:
    """Returns how far the bounds are apart."""
    bound = facts.epsilon
    text = "included in the upper bound, which is never below the truth"
    if 0.0 < bound.lower < math.inf and bound.upper < math.inf:
        share = (bound.upper - bound.lower) / bound.upper
        text += f"; the truth is less than {number(share, digits=2)} of ε below it"
    return text


def _attacks(facts: Facts) -> Section:
    text = (
        "An attack that decides whether one record was used has a false positive rate (records that were not used, "
        "and are taken for used) and a true positive rate (records that were used, and are found). No attack "
        "whatsoever exceeds these, however it is made."
    )
    rows = tuple((f"{rate:g}", number(power)) for rate, power in facts.attacks)
    table = Table(("false positive rate", "true positive rate at most"), rows)
    return Section("What an attack can do", (Paragraph(text), table, *attacks_picture(facts)))


def _covered(facts: Facts) -> Section:
    covered: tuple[str, ...] = (
        (
            "Everything that the steps on record released: every noisy sum, and with it every checkpoint, the final "
            "model, and whatever is computed from them and from public data."
        ),
        "Every step that was begun, also those that broke off.",
        "Choices that depend on earlier releases, as gradients depend on the weights.",
    )
    if holds_selection(facts.phases):
        covered = (*covered, "Of a selection among several runs: all that the best of them released, and that alone.")
    outside = {
        "tuning": "hyperparameters chosen by runs that are not in this ledger",
        "preprocessing": "preprocessing that looked at the private data",
        "early_stopping": "a checkpoint or a time to stop that was chosen by private data without noise",
        "statistics": "losses, accuracies and other statistics released without noise",
        "other_releases": "other releases about the same data",
    }
    runs = ("Of a selection: the runs that were not the best, how many there were, and how long they took.",)
    not_covered = runs * holds_selection(facts.phases) + tuple(
        f"{text[0].upper()}{text[1:]}. "
        + ("Nothing was declared." if topic not in facts.declarations else f"Declared: {facts.declarations[topic]}")
        for topic, text in outside.items()
    )
    return Section(
        "What is covered, and what is not",
        (Paragraph("Covered:"), Bullets(covered), Paragraph("Not covered:"), Bullets(not_covered)),
    )


def _threats(facts: Facts) -> Section:
    items: tuple[str, ...] = (
        "The adversary sees everything that was released: all noisy gradients of all steps, and so all checkpoints.",
        (
            "The adversary knows all records but one, the model, the code, the hyperparameters, rates and numbers of "
            "steps, and has any amount of time to compute."
        ),
        (
            "The adversary does not see which records were in a batch, the sums before noise, the keys that noise and "
            "batches are drawn from, or the memory of the machine."
        ),
        "The adversary does not take part in training.",
    )
    if holds_selection(facts.phases):
        text = "Of a selection among several runs the adversary sees the best run alone, and not how many there were."
        items = (*items, text)
    return Section("Threat model", (Bullets(items),))


def _record(facts: Facts) -> Section:
    marks = tuple(mark_in_words(mark) for mark in facts.marks)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    rows = (
        ("Digest of the ledger (SHA-256)", facts.digest),
        ("Runs on record", "not said" if facts.runs is None else str(facts.runs)),
        ("Steps", f"{facts.steps} begun; a ledger does not know how many of them were finished, and counts all"),
        ("Randomness", _randomness(facts)),
        ("Report made", f"{facts.created}, with {versions}"),
    )
    blocks: list[Block] = [Table(("", ""), rows)]
    blocks += [Paragraph("Marks of the ledger:"), Bullets(marks)] if marks else [Paragraph("The ledger has no marks.")]
    return Section("The record", tuple(blocks))


def _randomness(facts: Facts) -> str:
    if REPRODUCIBLE in facts.marks:
        key = "a run had a reproducible key"
    else:
        key = "no run is marked as one with a reproducible key; all other keys come from the operating system"
    said = facts.declarations.get("randomness")
    return f"{key}. {'The generator was not declared.' if said is None else f'Declared: {said}'}"


def _audits(facts: Facts) -> Section:
    if not facts.audits:
        return Section("Audits", (Paragraph("No audit was handed to this report."),))
    rows = tuple(
        (
            audit.kind,
            f">= {number(audit.lower_bound, up=False)}",
            number(epsilon),
            "-" if audit.claimed is None else number(audit.claimed),
            f"{audit.delta:g}",
            f"{audit.confidence:g}",
            str(audit.canaries),
            "-" if audit.seconds is None else f"{audit.seconds:.3g}",
            audit.version,
        )
        for audit, epsilon in facts.audits
    )
    header = ("kind", "ε found", "ε by the ledger", "ε claimed", "δ", "confidence", "canaries", "seconds", "version")
    text = (
        "An audit attacks the training, and finds an ε that it has at least. It can show a promise to be false, never "
        "to be true."
    )
    return Section("Audits", (Paragraph(text), Table(header, rows)))


def _hazards(facts: Facts) -> Section:
    found = hazards(facts)
    counts = ", ".join(f"{sum(each.status is status for each in found)} {text}" for status, text in _STATUS.items())
    text = (
        f"After NIST SP 800-226 and arXiv 2303.00654, section 5.3: {counts}. Declarations are the user's words; nobody "
        "checked them."
    )
    rows = tuple((each.name, _STATUS[each.status], each.detail) for each in found)
    return Section("Hazards", (Paragraph(text), Table(("hazard", "status", "how"), rows)))


def _verify(facts: Facts) -> Section:
    text = (
        "Whoever has the ledger's file and the JSON form of this report can check that they belong together, and that "
        "the numbers are those of the accountant: privet report LEDGER --verify REPORT.json. The digest shows that "
        "the record is the same; it does not show who wrote it."
    )
    return Section("How to check this report", (Paragraph(text),))
