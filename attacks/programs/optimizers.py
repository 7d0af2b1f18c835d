"""Ways for a gradient that nothing clipped or noised to move a parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.doors import Paper, rows
from attacks.table import Billed, Outcome, Unseen, attack

KIND = "other ways to step"
X = rows(8, 3)


def _run(mode: str = "auto") -> Paper:
    return Paper(nn.Linear(3, 2), noise=1.0, lr=0.1, grad_sample_mode=mode)


def _loss(net: nn.Module) -> Tensor:
    return net(X).square().mean()


def stepped(run: Paper, act: Callable[[], None]) -> Billed:
    """Returns infinity as the honest ε if parameters moved, or a gradient is left, that nothing was billed for."""
    before = [p.detach().clone() for p in run.net.parameters()]
    act()
    moved = any(not torch.equal(a, b) for a, b in zip(before, run.net.parameters(), strict=True))
    left = any(p.grad is not None and bool(p.grad.any()) for p in run.net.parameters()) and not run.seen
    return Billed(run.engine.get_epsilon(1e-5), float("inf") if (moved and not run.seen) or left else 0.0)


def _another(mode: str) -> Billed:
    run = _run(mode)
    other = torch.optim.SGD(run.net.parameters(), lr=0.1)

    def act() -> None:
        for _ in range(4):
            run.net.zero_grad()
            _loss(run.net).backward()
            other.step()

    return stepped(run, act)


for _mode in ("auto", "hooks", "functorch"):
    attack(KIND, f"an ordinary optimizer beside the private one, mode {_mode}")(lambda mode=_mode: _another(mode))


@attack(KIND, "a penalty on a parameter in the loss")
def _() -> Outcome:
    run = _run()
    return stepped(run, lambda: run.step(_loss(run.net) + run.net.weight.square().sum()))


@attack(KIND, "forward() called past the hooks")
def _() -> Outcome:
    run = _run()
    return stepped(run, lambda: run.step(run.net.forward(X).square().mean()))


@attack(KIND, "training in eval mode")
def _() -> Outcome:
    run = _run()
    run.net.eval()
    return stepped(run, lambda: run.step(_loss(run.net)))


@attack(KIND, "a gradient put into p.grad by hand")
def _() -> Outcome:
    run = _run()

    def act() -> None:
        run.net.weight.grad = torch.autograd.functional.jacobian(
            lambda w: (X @ w.T).square().mean(), run.net.weight.data
        )
        run.optimizer.step()

    return stepped(run, act)


@attack(KIND, "parameters swapped for others by .double()")
def _() -> Outcome:
    run = _run()

    def act() -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            run.net.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        (run.net(X.double()).square().mean() + run.net.weight.square().sum()).backward()

    return stepped(run, act)


@attack(KIND, "a parameter thawed and added to the optimizer")
def _() -> Outcome:
    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    run = Paper(net, noise=1.0, lr=0.1)

    def act() -> None:
        net[0].requires_grad_(True)
        run.optimizer.add_param_group({"params": list(net[0].parameters())})
        run.step(_loss(net))

    return stepped(run, act)


@attack(KIND, "a deep copy trained")
def _() -> Outcome:
    run = _run()
    twin = copy.deepcopy(run.net)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    _loss(twin).backward()
    other.step()
    return "nothing stopped it"


@attack(KIND, "a copy made private anew")
def _() -> Outcome:
    honest, first = _run(), _run()
    for run in (honest, honest, first):
        run.step(_loss(run.net))
    twin = copy.deepcopy(first.net)
    again = Paper(twin, noise=1.0, lr=0.1)
    again.step(_loss(twin))
    return Billed(again.engine.get_epsilon(1e-5), honest.engine.get_epsilon(1e-5))


@attack(KIND, "detached, trained without privacy, and private again")
def _() -> Outcome:
    run = _run()
    run.step(_loss(run.net))
    run.engine.detach(run.net)
    _loss(run.net).backward()
    run.optimizer.step()
    again = Paper(run.net, noise=1.0, lr=0.1)
    again.step(_loss(run.net))
    least = min(engine.get_epsilon(1e-5) for engine in (run.engine, again.engine))
    return Billed(least, float("inf"))


@attack(KIND, "two private networks that share a layer")
def _() -> Outcome:
    layer = nn.Linear(3, 3)
    for _ in range(2):
        Paper(nn.Sequential(layer, nn.Linear(3, 2)), noise=1.0)
    return "nothing stopped it"


@attack(KIND, "LBFGS")
def _() -> Outcome:
    from torch.utils.data import DataLoader, TensorDataset

    from privet import PrivacyEngine

    net = nn.Linear(3, 2)
    PrivacyEngine().make_private(
        module=net, optimizer=torch.optim.LBFGS(net.parameters()), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(TensorDataset(X), batch_size=4),
    )  # fmt: skip
    return "nothing stopped it"


@attack(KIND, "two backwards for one step")
def _() -> Outcome:
    run = _run()
    _loss(run.net).backward()
    _loss(run.net).backward()
    return "nothing stopped it"


@attack(KIND, "two steps on one gradient")
def _() -> Outcome:
    run = _run()
    run.step(_loss(run.net))
    run.optimizer.step()
    return "nothing stopped it"


@attack(KIND, "a GradScaler")
def _() -> Outcome:
    run, scaler = _run(), torch.amp.GradScaler("cpu")
    scaler.scale(_loss(run.net)).backward()
    scaler.step(run.optimizer)
    return "nothing stopped it"


@attack(KIND, "a gradient penalty")
def _() -> Outcome:
    run, x = _run(), X.clone().requires_grad_(True)
    torch.autograd.grad(run.net(x).sum(), x, create_graph=True)
    return "nothing stopped it"


@attack(KIND, "a Function of the user's own that takes a parameter")
def _() -> Outcome:
    class Mul(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)  # type: ignore[attr-defined]
            return x @ w.t()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x, w = ctx.saved_tensors  # type: ignore[attr-defined]
            return g @ w, g.t() @ x

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Mul.apply(x, self.weight) + self.bias

    run = Paper(Net(3, 2), noise=1.0, lr=0.1)
    return stepped(run, lambda: run.step(_loss(run.net)))


@attack(KIND, "a head outside of the private module, with an optimizer of its own")
def _() -> Outcome:
    run, head = _run(), nn.Linear(2, 1)
    other, before = torch.optim.SGD(head.parameters(), lr=0.1), head.weight.detach().clone()
    run.step(head(run.net(X)).square().mean())
    other.step()
    if torch.equal(before, head.weight):
        return 0.0
    return Unseen("A head outside of the private module", "the head has moved without noise")


@attack(KIND, "a torch.jit script")
def _() -> Outcome:
    Paper(torch.jit.script(nn.Linear(3, 2)), noise=1.0)
    return "nothing stopped it"
