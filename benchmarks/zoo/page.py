"""The page of the documentation that shows what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.zoo.case import Case
from benchmarks.zoo.examine import Finding
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.run import Results

__all__ = ["page", "verdict"]

DOORS = ("paper", "explicit")
ABOUT = """\
Each architecture is built tiny, with random weights and its own defaults, and trained for a few private steps without
noise at both doors. The sums that come out are compared with plain autograd, **one example at a time**, in float64,
without dropout: with clip norms of a tenth of the least gradient norm, of the median norm, and of a million, and with
batches of 5, 4 and 16 examples, where 16 is also the number of positions and the width, and 4 the number of heads. With
dropout on, plain autograd starts from the same seed. Then the last example is removed, changed (numbers times 1000,
tokens in another order), or its loss left out: the sum must move by at most the clip norm.

*exact*: all sums agree with plain autograd to 1e-5 of their terms (nearly all to 1e-12; a few models compute in
float32), and no change moved one by more than 1.00 clip norms. *refused*: an error that says why, before anything was
released. An error of the table is the largest one of any parameter, in any of these steps. `make zoo` writes this
page: `make zoo ZOO="llama t5"` examines some again."""


BEFORE = """\
At version 0.1.0, 203 models were tried by hand in the same way: 156 were exact at both doors, 5 more at the explicit
door, 14 were refused rightly, two kinds of sums were wrong, and the rest was refused without need:

| then | now |
|---|---|
| T5 with dropout, refused | exact, and trains with dropout (`tests/contracts/test_default_models.py`) |
| wav2vec2 and HuBERT with layer dropout and SpecAugment: refused at random | exact |
| DeBERTa-v2 and v3, WavLM: refused | exact (`tests/contracts/test_default_models.py`) |
| reentrant checkpoints of GPT-2, refused | exact |
| reentrant checkpoints of T5, refused without the way on | refused, and the message names `use_reentrant=False` |
| a Function of a parameter in a module with a rule of the user's: refused | exact |
| checkpoints of T5 that are not reentrant, an error of torch | exact |
| Mixtral, Qwen-MoE, DeepSeek-V3 with the experts they come with: refused | exact |
| RecurrentGemma, refused | exact |
| packed sequences, refused | exact (`tests/gradients/capture/test_packed_rows.py`) |
| flat ids with offsets (DLRM), refused at the paper's door | exact (`tests/gradients/capture/test_flat_bags.py`) |
| graph networks, refused | exact |
| a gradient in the loss, an error of torch | exact at the explicit door, refused by name at the paper's |
| `cat([a, b])` inside of a model, refused | refused: give the two views as a tuple, or call the model twice |"""


def verdict(finding: Finding) -> str:
    """Returns one word or two for a finding: the worse of both doors, or what became of the case instead."""
    if "verdict" in finding:
        return str(finding["verdict"])
    found = [finding[door]["verdict"] for door in DOORS if door in finding]
    return next((each for each in ("WRONG", "failed", "refused") if each in found), "exact")


def _at(finding: Finding, door: str) -> str:
    found = finding.get(door)
    if found is None:
        return "-" if "verdict" in finding else "not for it"
    if found["verdict"] != "exact":
        stage = " with dropout" if found.get("stage") == "dropout on" else ""
        return f"{found['verdict']}{stage}"
    return f"exact, {found['error']:.0e}"


def _remark(finding: Finding) -> str:
    words = [finding.get("note", "")]
    messages = [finding.get("message", ""), *(finding.get(door, {}).get("message", "") for door in DOORS)]
    message = next((m for m in messages if m), "")
    if message:
        short = " ".join(message.split()).split(". ")[0][:220]
        words.insert(0, short.replace("|", "/").replace("<", "&lt;").rstrip(". "))
    return "; ".join(w for w in words if w)


def _table(cases: Sequence[Case], results: Results) -> list[str]:
    lines = ["| model | paper's door | explicit door | dropout | remark |", "|---|---|---|---|---|"]
    for case in cases:
        finding = results.found.get(Results.key(case))
        if finding is None:
            continue
        on = any(finding.get(door, {}).get("with_dropout") for door in DOORS)
        dropout = "exact too" if on else "has none" if not finding.get("dropout") else "-"
        lines.append(
            f"| {case.name} | {_at(finding, 'paper')} | {_at(finding, 'explicit')} | {dropout} | {_remark(finding)} |"
        )
    return lines


def page(results: Results, cases: Sequence[Case]) -> str:
    """Returns the page: what was done, the counts, and a table for each family."""
    found = [(case, results.found[Results.key(case)]) for case in cases if Results.key(case) in results.found]
    models = [finding for case, finding in found if not case.short]
    counts = Counter(verdict(finding) for finding in models)
    titles = dict.fromkeys(title for title, _ in FAMILIES.values())
    versions = ", ".join(f"{name} {version}" for name, version in results.about.get("versions", {}).items())
    lines = [
        "# Models that were tried",
        "",
        ABOUT,
        "",
        f"**{len(models)} models: {', '.join(f'{n} {word}' for word, n in counts.most_common())}.**",
        "",
        f"{results.about.get('date', '')}; {versions}; Python {results.about.get('python', '')}, CPU, one thread.",
        "",
        "| family | models | exact | refused | else |",
        "|---|---|---|---|---|",
    ]
    for title in titles:
        of = Counter(verdict(finding) for case, finding in found if case.family == title)
        if of:
            rest = sum(of.values()) - of["exact"] - of["refused"]
            lines.append(f"| {title} | {sum(of.values())} | {of['exact']} | {of['refused']} | {rest} |")
    short = sum(bool(finding.get("short")) for finding in models)
    waiting = Counter(case.family for case in cases if Results.key(case) not in results.found)
    if short:
        lines += [
            "",
            (
                f"{short} of them were examined in short: C is the median norm alone, 16 examples come after 5, and "
                "dropout is on at the explicit door alone."
            ),
        ]
    if waiting:
        lines += ["", f"No result yet: {', '.join(f'{n} of {title!r}' for title, n in waiting.items())}."]
    lines += ["", "## Before and now", "", BEFORE]
    for title in titles:
        if any(case.family == title for case, _ in found):
            lines += ["", f"## {title}", "", *_table([case for case in cases if case.family == title], results)]
    return "\n".join(lines) + "\n"
