"""Attacks on the guarantee, as small programs: what one example can move, what is billed, and what is refused."""
