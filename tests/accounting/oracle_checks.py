"""What a claim of an accountant is held to, in terms of the oracle's intervals."""

from __future__ import annotations

import math

import oracle

from privet.accounting import PldAccountant, Relation

ROUNDING = 1e-6  # relative, on δ: what two float64 computations may differ by
SMALLEST = 1e-14  # ε below which δ is flat to float64


def check_claim(event, delta, relation=Relation.ADD_OR_REMOVE_ONE, group_size=1, *, within=None, accountant=None):
    """Fails where ε at δ is too small, the lower bound too large, or (if asked) ε more than `within` too large.

    Returns how far above the truth the claim is, relative, to first order; nan where nothing can be said.
    """
    asked = accountant or PldAccountant()
    bound = asked.epsilon_bounds(event, delta, relation=relation, group_size=group_size)
    found = check_upper(event, bound.upper, delta, relation, group_size)
    check_lower(event, bound.lower, delta, relation, group_size)
    if bound.upper <= SMALLEST or not math.isfinite(bound.upper):
        return math.nan
    step = 1e-3 if within is None else within
    nearer = oracle.delta(event, bound.upper / (1.0 + step), relation, group_size)
    if within is not None:
        assert nearer.high >= delta * (1.0 - ROUNDING), (
            f"ε = {bound.upper} is more than {within:.1%} too large: {nearer}"
        )
    slope = math.log(max(nearer.high, 1e-300)) - math.log(max(found.high, 1e-300))
    return step * (math.log(delta) - math.log(max(found.high, 1e-300))) / slope if slope > 0.0 else math.nan


def check_upper(event, epsilon, delta, relation=Relation.ADD_OR_REMOVE_ONE, group_size=1):
    """Fails if the event is not (ε, δ)-private: some data set reaches more than δ at ε."""
    if math.isinf(epsilon):
        return oracle.Interval(0.0, 0.0)
    # δ falls with ε, so what is reached at a larger ε is reached at 0, where the integral falls slowly.
    places = (1e-5, 1e-3, 0.03, 0.3) if epsilon <= SMALLEST else (epsilon,)
    for place in places:
        found = oracle.delta(event, place, relation, group_size)
        assert found.low <= delta * (1.0 + ROUNDING), (
            f"ε = {epsilon} is too small for δ = {delta}: at {place} δ is {found}"
        )
    return found


def check_lower(event, epsilon, delta, relation=Relation.ADD_OR_REMOVE_ONE, group_size=1):
    """Fails if a lower bound on ε is above what is proven."""
    if epsilon > SMALLEST:
        found = oracle.delta(event, epsilon, relation, group_size)
        assert found.high >= delta * (1.0 - ROUNDING), f"ε >= {epsilon} is said at δ = {delta}: there δ is {found}"


def check_delta(event, epsilon, relation=Relation.ADD_OR_REMOVE_ONE, group_size=1, *, accountant=None):
    """Fails where δ at ε is too small, or its lower bound too large."""
    asked = accountant or PldAccountant()
    bound = asked.delta_bounds(event, epsilon, relation=relation, group_size=group_size)
    found = oracle.delta(event, epsilon, relation, group_size)
    assert bound.upper >= found.low * (1.0 - ROUNDING), f"δ = {bound.upper} at ε = {epsilon} is too small: {found}"
    assert bound.lower <= found.high * (1.0 + ROUNDING), f"δ >= {bound.lower} at ε = {epsilon} is too large: {found}"
    return found
