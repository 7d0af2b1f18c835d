"""The attacks, one class a module. Importing this fills the table."""

from attacks.programs import bill, interrupts, losses, mixing, modules, norms, optimizers, rows, state

__all__ = ["bill", "interrupts", "losses", "mixing", "modules", "norms", "optimizers", "rows", "state"]
