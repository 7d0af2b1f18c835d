"""The discrete Gaussian law, drawn exactly: against its masses, and the fast way against the one in integers alone."""

from __future__ import annotations

import math
from collections import Counter

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from privet.noise import NoiseKey, discrete_draw, discrete_law
from privet.noise.discrete_draw import CHUNK, DiscreteDraw
from privet.noise.discrete_law import DiscreteLaw, exponential
from privet.noise.keystream import BLOCK_BYTES, StepKey, TagBook, keystream_into, scattered_words
from tests.noise.law import refutations

SCALES = (1, 3, 20, 700, 3000)
LEVEL = 1e-6


def draws(seed: int = 5) -> DiscreteDraw:
    return DiscreteDraw(NoiseKey.from_generator(torch.Generator().manual_seed(seed)), purpose="noise.discrete")


def many(law: DiscreteLaw, count: int, seed: int = 5, step: int = 1) -> np.ndarray:
    draw = draws(seed)
    parts = [draw.values(law, min(CHUNK, count - at), step=step, name="w", start=at) for at in range(0, count, CHUNK)]
    return np.concatenate(parts)


@pytest.fixture(params=[9, 2], ids=["strips as they are", "wide strips"])
def strips(request, monkeypatch):
    # In wide strips one proposal in four is rejected, so that a wrong rule shows.
    monkeypatch.setattr(discrete_law, "_STRIPS", request.param)


def misfit(values: np.ndarray, scale: int) -> float:
    """Returns how likely values of N_Z(0, s²) fit it no better than these: chi-square, in bins, by their last bits."""
    reach = 8 * scale + 8
    z = np.arange(-reach, reach + 1)
    mass = np.exp(-(z**2) / (2.0 * scale**2))
    mass /= mass.sum()
    width = max(1, scale // 6)
    found = []
    for name in (lambda number: number // width, lambda number: number % 8):
        bins, place = np.unique(name(z), return_inverse=True)
        expected = np.bincount(place, weights=mass) * len(values)
        counts = Counter(name(values).tolist())
        seen = np.array([counts[int(each)] for each in bins], dtype=float)
        big = expected >= 10
        rest = (len(values) - seen[big].sum(), expected[~big].sum())
        statistic = ((seen - expected)[big] ** 2 / expected[big]).sum() + (
            (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] > 1e-3 else 0.0
        )
        found.append(stats.chi2.sf(statistic, max(1, int(big.sum()) - (rest[1] <= 1e-3))))
    return float(min(found))


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("scale", SCALES)
def test_the_masses_are_those_of_the_law(scale):
    values = many(DiscreteLaw(scale), 100_000)
    assert misfit(values, scale) > LEVEL
    near = max(1, round(scale * 1.05))
    assert scale < 20 or misfit(values, near) < LEVEL  # and the test tells a law that is a little wider


@pytest.mark.parametrize(
    "bug", ["zero twice", "always accepted", "never negative", "a strip too far", "accepted by half"]
)
def test_planted_bugs_are_refuted(monkeypatch, bug):
    monkeypatch.setattr(discrete_law, "_STRIPS", 2)
    signed, strips, margin = discrete_draw._signed, discrete_draw._strips, discrete_draw._margin
    scale = 3 if bug == "zero twice" else 700
    law = DiscreteLaw(scale)
    if bug == "zero twice":
        monkeypatch.setattr(discrete_draw, "_signed", lambda *a: (signed(*a)[0], np.zeros(len(a[1]), dtype=bool)))
    elif bug == "always accepted":
        law.sure = 2**63 - 1
    elif bug == "never negative":
        monkeypatch.setattr(discrete_draw, "_signed", lambda *a: (np.abs(signed(*a)[0]), signed(*a)[1]))
    elif bug == "a strip too far":
        monkeypatch.setattr(discrete_draw, "_strips", lambda *a: (strips(*a)[0] + 1, strips(*a)[1]))
    else:
        monkeypatch.setattr(discrete_draw, "_margin", lambda *a: margin(*a) / 2 + 0.25)
    assert misfit(many(law, 100_000), scale) < LEVEL


@pytest.mark.parametrize("scale", [2**40, 2**41 - 1, 3 * 2**39 + 12345])
def test_on_the_grid_of_a_release_it_is_as_good_as_normal(scale):
    values = many(DiscreteLaw(scale), 50_000)
    assert refutations(values / scale, 1.0) == []
    for bits in (values & 1023, values >> 20 & 1023):  # all digits beyond the first are uniform
        assert stats.chisquare(np.bincount(bits, minlength=1024)).pvalue > LEVEL


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("scale", [3, 700, 2**40 + 7])
def test_the_fast_way_is_the_one_in_integers(monkeypatch, scale):
    fast = many(DiscreteLaw(scale), 400)
    monkeypatch.setattr(discrete_draw, "_MARGIN", 2.0)  # every comparison counts as a tie
    law = DiscreteLaw(scale)
    law.sure = 0
    called = []
    exactly = DiscreteDraw._exactly

    def counted(*args, **options):
        called.append(args)
        return exactly(*args, **options)

    monkeypatch.setattr(DiscreteDraw, "_exactly", counted)
    assert np.array_equal(many(law, 400), fast)
    assert len(called) >= 400


class _Words:
    """Words of our own in the place of the keystream: by attempt and depth."""

    def __init__(self, monkeypatch, words):
        self.words = words
        self.read = []

        def stream(draw, attempt, depth):
            label = (attempt, depth)
            return type("Stream", (), {"cipher": lambda self, step: label, "blocks": lambda self, step: label})()

        def of(label):
            self.read.append(label)
            return self.words.get(label, (0, 0))

        def whole(out, *, cipher, tag, block, size):
            out[: 8 * 2] = np.array(of(cipher), dtype="<u8").tobytes()

        def some(blocks, *, cipher, tag):
            return np.array([of(cipher)] * len(blocks), dtype=np.uint64).view(np.int64).reshape(-1, 2)

        monkeypatch.setattr(DiscreteDraw, "_stream", stream)
        monkeypatch.setattr(discrete_draw, "keystream_into", whole)
        monkeypatch.setattr(discrete_draw, "scattered_words", some)


@pytest.mark.parametrize(("more", "strip"), [(0, 41), (2**64 - 1, 40)])
def test_a_tie_of_strips_is_decided_by_more_bits(monkeypatch, more, strip):
    law = DiscreteLaw(3000)
    tie = int(law.tables.tails[40])  # v / 2^63 is just below R_40, or just above it, as what comes next says
    given = _Words(monkeypatch, {(0, 0): (tie, 5), (0, 1): (0, more)})
    assert draws().values(law, 1, step=0, name="w", start=0).tolist() == [(strip << law.width_bits) + 5]
    assert (0, 1) in given.read


@pytest.mark.parametrize(("more", "accepted"), [(0, True), (2**64 - 1, False)])
def test_a_tie_of_acceptance_is_decided_by_more_bits(monkeypatch, more, accepted):
    law = DiscreteLaw(3000)
    v, x = 2**61, 7
    strip = int((law.tables.tails > v).sum())
    with mp.workdps(60):
        exponent = mp.mpf(x * ((strip << (law.width_bits + 1)) + x)) / (2 * 3000**2)
        bits = int(mp.floor(mp.exp(-exponent) * mp.mpf(2) ** (law.accept_bits + 64)))
    first = bits >> 64 << law.width_bits | x
    other = (1 << 63) - 1  # a strip near 0 for the next attempt, in which u = 0
    given = _Words(monkeypatch, {(0, 0): (v, first), (0, 1): (bits % 2**64, 0), (0, 2): (more, 0), (1, 0): (other, 3)})
    expected = (strip << law.width_bits) + x if accepted else 3
    assert draws().values(law, 1, step=0, name="w", start=0).tolist() == [expected]
    assert (0, 2) in given.read


def test_values_beyond_the_tables_are_found_one_by_one(monkeypatch):
    law = DiscreteLaw(2**40)
    _Words(monkeypatch, {(0, 0): (3, 9)})  # v = 3: beyond eight standard deviations
    (found,) = draws().values(law, 1, step=0, name="w", start=0).tolist()
    chance = mp.erfc(mp.mpf(found) / law.scale / mp.sqrt(2))
    assert 3.0 * 0.97 <= float(chance * 2**63) <= 4.0 * 1.03
    assert found > 8 * law.scale


def test_tails_and_exponentials_are_within_their_errors():
    with mp.workdps(120):
        for scale in (1, 20, 700):
            law = DiscreteLaw(scale)
            exact = law.exact_tails(192)
            square = mp.mpf(2) ** (2 * law.width_bits) / (2 * mp.mpf(scale) ** 2)
            weights = [mp.exp(-k * k * square) for k in range(len(exact.values) + 60)]
            total, above = mp.fsum(weights), mp.fsum(weights)
            for weight, value in zip(weights, exact.values, strict=False):
                above -= weight
                assert abs(above / total * mp.mpf(2) ** exact.digits - value) <= exact.error
            for tail, value in zip(law.tables.tails[:-1], exact.values, strict=False):
                assert tail == value >> exact.digits - 63
        for share in ((0, 1), (1, 1), (3, 7), (1, 10**9)):
            wanted = mp.exp(-mp.mpf(share[0]) / share[1]) * mp.mpf(2) ** 300
            assert abs(exponential(*share, 300) - wanted) <= 308


def test_the_strip_of_a_number_is_the_count_of_tails_above_it():
    law = DiscreteLaw(700)
    drawn = np.random.default_rng(0).integers(2**20, 2**63, 3000)
    near = np.concatenate([law.tables.tails[:-1] + by for by in (-1, 0, 1)])
    words = np.concatenate([drawn, near[near >= 2**20]])
    strips, open_strip = discrete_draw._strips(law, words)
    assert np.array_equal(strips, (law.tables.tails[:-1][None] > words[:, None]).sum(1))
    assert np.array_equal(open_strip, np.isin(words, law.tables.tails))
    assert discrete_draw._strips(law, np.array([0, 2**20 - 1]))[1].all()


@pytest.mark.usefixtures("strips")
def test_values_depend_on_the_address_alone():
    law, draw = DiscreteLaw(2**40 + 3), draws()
    whole = draw.values(law, 500, step=3, name="a", start=10)
    assert np.array_equal(draw.values(law, 500, step=3, name="a", start=10), whole)
    assert np.array_equal(draw.values(law, 77, step=3, name="a", start=133), whole[123:200])
    for other in (
        draw.values(law, 500, step=4, name="a", start=10),
        draw.values(law, 500, step=3, name="b", start=10),
        draws(6).values(law, 500, step=3, name="a", start=10),
    ):
        assert np.count_nonzero(other == whole) == 0


def test_scattered_words_are_those_of_the_stream():
    key = NoiseKey.from_generator(torch.Generator().manual_seed(1))
    streams, tag, start = StepKey(key, purpose="x"), TagBook().tag("w"), 2**40
    raw = bytearray(40 * BLOCK_BYTES + BLOCK_BYTES)
    keystream_into(memoryview(raw), cipher=streams.cipher(2), tag=tag, block=start, size=40 * BLOCK_BYTES)
    words = np.frombuffer(raw, dtype="<i8", count=80).reshape(-1, 2)
    chosen = np.array([39, 0, 7, 8])
    assert np.array_equal(scattered_words(chosen + start, cipher=streams.blocks(2), tag=tag), words[chosen])
    assert math.isclose(DiscreteLaw(2**40).sure / 2.0**31, 0.97, abs_tol=0.01)
