"""Near ties: a different choice of experts counts as a tie only when the router itself proves it.

The proof is a witness. Take one side's router logits, raise the experts the other side chose by the error
bound, lower all others by it, and let the router select in float64. If it now selects the other side's
experts, a rounding error within the bound explains the difference; otherwise it does not. This holds for
groups and selection biases too. The reference's logits are used where it records them, else the engine's,
which then must not be the only witness: see :func:`moe_export.verify.routing.compare_routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..schema import MoELayer
    from ..trace import LayerTrace

    Select = Callable[[NDArray[Any]], NDArray[np.int32]]

_SMALLEST_BOUND = 1e-12
_REPRODUCED = 0.99


@dataclass(frozen=True)
class TieProver:
    """Selects experts from logits as the source's router does, or says why that is not known.

    ``select`` maps logits [T, E] to ids [T, K] in float64 arithmetic; None: nothing can be proven, for the
    reason in ``why``. ``logits`` [T, E] are the reference's or, with ``by_engine``, the engine's. ``plain``:
    neither selection bias nor groups, so experts that tie have equal weights.
    """

    select: Select | None
    why: str
    logits: NDArray[Any] | None = None
    by_engine: bool = False
    plain: bool = False

    def proves(
        self, tokens: NDArray[np.bool_], chosen: NDArray[np.int32], bound: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Per token [T], whether a change of the logits by at most ``bound`` [T] leads to ``chosen`` [T, K].

        Only ``tokens`` [T] are tried; a token with a dropped assignment (id −1) is never proven.
        """
        import numpy as np

        proven = np.zeros(len(chosen), bool)
        if self.select is None or self.logits is None:
            return proven
        usable = tokens & (chosen >= 0).all(axis=1) & (chosen < self.logits.shape[1]).all(axis=1)
        usable &= np.isfinite(self.logits).all(axis=1)
        if not usable.any():
            return proven
        base = np.asarray(self.logits[usable], np.float64)
        ids = chosen[usable]
        wanted = np.zeros(base.shape, bool)
        np.put_along_axis(wanted, ids.astype(np.int64), True, axis=1)
        delta = np.maximum(bound[usable], _SMALLEST_BOUND)[:, None]
        goal = np.sort(ids, axis=1)
        hit = np.zeros(len(ids), bool)
        # Lowering the others helps against their own rank, but where groups compete it can sink a chosen
        # group.
        for lowered in (1.0, 0.0):
            moved = base + np.where(wanted, delta, -lowered * delta)
            hit |= (np.sort(self.select(moved), axis=1) == goal).all(axis=1)
        proven[usable] = hit
        return proven

    def undecided(self, relative: float) -> NDArray[np.bool_]:
        """Per token [T], whether noise of ``relative`` size may change the choice; empty when that is
        unknown."""
        import numpy as np

        if self.select is None or self.logits is None:
            return np.zeros(0, bool)
        chosen = self.select(self.logits)
        bound = logit_bound(self.logits, relative)[:, None]
        taken = np.zeros(self.logits.shape, bool)
        np.put_along_axis(taken, chosen.astype(np.int64), True, axis=1)
        moved = self.select(np.where(taken, self.logits - bound, self.logits + bound))
        return np.asarray((np.sort(moved, axis=1) != np.sort(chosen, axis=1)).any(axis=1))


def logit_bound(logits: NDArray[Any], relative: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Error bound per token [T]: ``relative`` (one number or [T]) times the token's largest finite
    |logit|."""
    import numpy as np

    x = np.abs(np.asarray(logits, np.float64))
    x = np.where(np.isfinite(x), x, 0.0)
    return np.asarray(relative * (x.max(axis=1) if x.size else np.zeros(len(x))))


def make_prover(layer: MoELayer, engine: LayerTrace, reference: LayerTrace, relative: float) -> TieProver:
    """The prover for one layer of one run, checked on the side whose logits it uses.

    A selection rule that does not reproduce that side's own choices (up to ties within ``relative``) proves
    nothing and is not used: then no token counts as a near tie.
    """
    import numpy as np

    by_engine = reference.logits is None
    side = engine if by_engine else reference
    if side.logits is None:
        return TieProver(None, "router logits are not in the graph, so no margin is known")
    select, name = _selection(layer)
    if select is None:
        return TieProver(None, name)
    logits, ids = np.asarray(side.logits, np.float64), side.expert_ids
    kept = np.asarray((ids >= 0).all(axis=1) & np.isfinite(logits).all(axis=1))
    if not kept.any():
        return TieProver(None, "no token has finite router logits and all its assignments")
    name += " on the engine's router logits" if by_engine else " on the reference's router logits"
    prover = TieProver(select, name, logits, by_engine, _is_plain(layer))
    own = (np.sort(select(logits[kept]), axis=1) == np.sort(ids[kept], axis=1)).all(axis=1)
    if not own.all():
        own |= prover.proves(kept, ids, logit_bound(logits, relative))[kept]
    if own.mean() < _REPRODUCED:
        return TieProver(None, f"{name} does not reproduce that side's own choices, so no margin is known")
    return prover


def _is_plain(layer: MoELayer) -> bool:
    router = layer.router or {}
    return (
        not router.get("biased")
        and router.get("selection_bias") is None
        and int(router.get("n_group", 1)) <= 1
    )


def _selection(layer: MoELayer) -> tuple[Select | None, str]:
    import numpy as np

    top_k = layer.top_k
    attributes = dict(layer.router or {})
    if not attributes or "score" not in attributes:
        return _by_value(lambda x: x, top_k), "order of the router logits"
    bias = attributes.get("selection_bias")
    if attributes.get("biased") and bias is None:
        return None, "the router adds a selection bias that the manifest does not hold"
    from ..ops.router import scores_and_selection

    known = ("score", "n_group", "topk_group", "group_score", "group_mask")
    options = {name: attributes[name] for name in known if name in attributes}
    fixed_bias = None if bias is None else np.asarray(bias, np.float64)

    def value(x: NDArray[Any]) -> NDArray[np.float64]:
        return scores_and_selection(x, fixed_bias, **options)[1]

    return _by_value(value, top_k), "the Router op's float64 reference"


def _by_value(value: Callable[[NDArray[Any]], NDArray[Any]], top_k: int) -> Select:
    import numpy as np

    def select(logits: NDArray[Any]) -> NDArray[np.int32]:
        return np.argsort(-value(logits), axis=1, kind="stable")[:, :top_k].astype(np.int32)

    return select
