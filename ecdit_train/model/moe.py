"""The sparse feed-forward: router, dispatcher and experts are siblings, so that a distributed dispatcher can take the
local one's place without the others knowing.

Legend: B images, S tokens per image, N = B * S tokens, G routing groups of P tokens (N = G * P), D hidden width, E experts
(e on this rank), C capacity, R rows (one token at one expert), of each expert in `x_eRD`.

Dataflow, all index based: `index_select` writes the operand of a batched product over stacked expert weights directly,
and `index_add` sums the weighted results. A one-hot dispatch (the paper's Algorithm 1) costs 1.4 to 2 times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from .assignment import Assignment, Rows, Selection, Table
from .router import Router, RouterInput

Settled = Table | Rows
"""An assignment whose rows are known."""
Pipeline = Callable[["Experts", Any], Any]
"""(experts, rows as `dispatch` left them) -> results as `combine` takes them: how experts are fed otherwise than with one table."""


class Experts(nn.Module):
    """e networks stacked on dim 0 of every parameter and buffer. Extend it, make the parameters, write `compute`."""

    constants: ClassVar[Mapping[str, float]] = {}
    """Parameters (local names) that start at one value; the others are Xavier-uniform over their last two dims."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        """e: how many this rank holds; `shard` lowers it."""

    def compute(self, x_eRD: Tensor) -> Tensor:
        """(e, R, D) -> (e, R, D), each row by itself; R may be 0. Written against `self.num_experts`, never a global count."""
        raise NotImplementedError

    def forward(self, rows: Any, pipeline: Pipeline | None = None) -> Any:
        """One call for all rows, because FSDP gathers and frees the weights around each call."""
        return self.compute(rows) if pipeline is None else pipeline(self, rows)

    def shard(self, *, index: int, count: int) -> None:
        """Keep the experts of part `index` of `count`, in place and without values: parameters and buffers are cut on dim 0."""
        E, e = self.num_experts, self.num_experts // count
        assert e * count == E, f"{count} ranks cannot share {E} experts evenly: a rule of the configuration"
        stores: list[dict[str, Any]] = [s for m in self.modules() for s in (m._parameters, m._buffers)]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor.dim() == 0 or tensor.shape[0] != E:
                    raise TypeError(
                        f"{type(self).__name__}.{name} has shape {tuple(tensor.shape)}: what experts hold is stacked on dim 0 "
                        f"({E} experts); what they share belongs elsewhere"
                    )
                part = tensor.new_empty((e, *tensor.shape[1:]))
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(part, requires_grad=tensor.requires_grad) if is_parameter else part
        for module in self.modules():
            if isinstance(module, Experts):
                module.num_experts = e


class Travel(Protocol):
    """How rows (E, s, D), the slots of this rank for all experts, reach their experts as (e, R, D), and back. What `send_*` returns
    is in flight, and may only be given to the `receive_*` of its name."""

    def send_out(self, x_EsD: Tensor) -> Tensor: ...

    def receive_out(self, x_EsD: Tensor) -> Tensor: ...

    def send_back(self, y_eRD: Tensor) -> Tensor: ...

    def receive_back(self, y_EsD: Tensor) -> Tensor: ...


class Dispatcher:
    """Brings tokens to their experts and back on one device. Gates and indices stay where they were made.

    Extend it and write `gather` and `sum`, which are needed on every layout. A fused form may also replace `dispatch`
    and `combine`: they are called with tables, on several ranks with a rank's share of one.
    """

    pipeline: Pipeline | None = None
    travel: Travel | None = None
    """None where all experts are here."""
    chunks: int = 1
    """Parts of a rank's slots that travel one after another."""

    def __init__(self, *, cap: float | None = None) -> None:
        self.cap = cap
        """See `config.slots.DispatcherConfig.cap`."""

    @property
    def local(self) -> Dispatcher:
        """The one that gathers and sums on this rank."""
        return self

    def enter(self, x_ND: Tensor, table: Table) -> tuple[Tensor, Table]:
        """Tokens and slots that this rank works on; `leave` ends what this begins. For who gathers and sums for itself."""
        return x_ND, table

    def leave(self, y_ND: Tensor) -> Tensor:
        """(N, D) of this rank's slots -> of all of them."""
        return y_ND

    def gather(self, x_ND: Tensor, index_R: Tensor) -> Tensor:
        """(N, D), (R,) -> (R, D): the rows of the tokens named."""
        raise NotImplementedError

    def sum(self, rows_RD: Tensor, index_R: Tensor, *, num_tokens: int) -> Tensor:
        """(R, D), (R,) -> (N, D): rows summed by token; tokens nobody names get 0."""
        raise NotImplementedError

    def limit(self, selection: Selection) -> Table | None:
        """Of a varying number of rows, those that are worked on in a static table; None where all of them are, however many."""
        return None if self.cap is None else selection.capped(self.cap)

    def settle(self, assignment: Assignment) -> Assignment:
        """Which rows there are. Not to be overridden (override `limit`): over ranks another way is taken."""
        if not isinstance(assignment, Selection):
            return assignment
        return self.limit(assignment) or assignment.rows().table()

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Any:
        """(N, D) -> (e, R, D): the rows of the experts on this rank."""
        assert isinstance(assignment, Table)
        E = assignment.index_EGC.shape[0]
        return self.gather(x_ND, assignment.index_EGC.flatten()).view(E, -1, x_ND.shape[1])

    def combine(self, y: Any, assignment: Assignment, *, num_tokens: int) -> Tensor:
        """(e, R, D) -> (N, D): sum over experts of gate * row (paper eq. 8); tokens nobody chose get 0."""
        assert isinstance(assignment, Table)
        return self.weigh(
            y.flatten(0, 1), assignment.gate_EGC.flatten(), assignment.index_EGC.flatten(), num_tokens=num_tokens
        )

    def weigh(self, y_RD: Tensor, gate_R: Tensor, index_R: Tensor, *, num_tokens: int) -> Tensor:
        """Sum by token of gate * row."""
        return self.sum(y_RD * gate_R[:, None].to(y_RD.dtype), index_R, num_tokens=num_tokens)


Form = Callable[[Experts, Dispatcher, Tensor, Settled], Tensor]
"""(experts, dispatcher, tokens (N, D), who takes what) -> (N, D): how the layer is carried out, with `plain`'s result."""


def plain(experts: Experts, dispatcher: Dispatcher, x_ND: Tensor, assignment: Settled) -> Tensor:
    """Step by step, for autograd to look at. `model.lean` keeps less for its backward pass."""
    rows = dispatcher.dispatch(x_ND, assignment)
    # A varying number of rows travels as one.
    y = experts(rows, None if isinstance(rows, Tensor) else dispatcher.pipeline)
    return dispatcher.combine(y, assignment, num_tokens=x_ND.shape[0])


class MoE(nn.Module):
    """Sparse feed-forward over routing groups of consecutive tokens."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        dispatcher: Dispatcher,
        shared: nn.Module | None = None,
        form: Form = plain,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.shared = shared
        """A feed-forward that works on every token beside the chosen experts."""
        self.form = form

    def forward(
        self,
        x_BSD: Tensor,
        *,
        group_tokens: int,
        normed_BSD: Tensor | None = None,
        hidden_BSD: Tensor | None = None,
        timestep_BD: Tensor | None = None,
    ) -> tuple[Tensor, Assignment]:
        """x: (B, S, D), what experts work on; `group_tokens` tokens compete for each expert (B * S must be whole groups). The
        others are what a router may look at besides (`RouterInput`); a layer on its own, as in tests, has x alone. Returns
        (B, S, D) and who took what (a Table or Rows)."""
        B, S, D = x_BSD.shape
        assert (B * S) % group_tokens == 0, f"{B} x {S} tokens are not whole groups of {group_tokens}"
        x_GSD, normed_GSD, hidden_GSD = (
            (x_BSD if z is None else z).reshape(-1, group_tokens, D) for z in (None, normed_BSD, hidden_BSD)
        )
        timestep_BD = x_BSD.new_zeros(B, D) if timestep_BD is None else timestep_BD
        tokens = RouterInput(
            x_GSD=x_GSD, normed_GSD=normed_GSD, hidden_GSD=hidden_GSD, timestep_BD=timestep_BD, image_tokens=S
        )
        assignment = self.dispatcher.settle(self.router(tokens))
        assert isinstance(assignment, Settled)
        y_ND = self.form(self.experts, self.dispatcher, x_BSD.reshape(-1, D), assignment)
        y_BSD = y_ND.view(B, S, D)
        return (y_BSD if self.shared is None else y_BSD + self.shared(x_BSD)), assignment
