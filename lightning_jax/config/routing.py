"""How experts are chosen at inference, where that is not the run's own way."""

from __future__ import annotations

import dataclasses

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require, require_choice
from lightning_jax.config.kinds import LARGEST_INDEX
from lightning_jax.config.model import ROUTINGS, ModelConfig


@dataclasses.dataclass(frozen=True)
class EvalRouting:
    """What replaces a run's routing of evaluation and generation; None keeps its own.

    Attributes:
      routing: a name of `config.model.ROUTINGS`.
      top_k: experts per token; needs the routing top_k.
      top_p: probability that the experts of a token reach; needs the routing top_p.

    Raises:
      UserError: a value out of its range, by the name of its flag: `--eval.top_p`.
    """

    routing: str | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.routing is not None:
            require_choice("eval.routing", self.routing, ROUTINGS)
        right = f"in [1, {LARGEST_INDEX}]"
        require(
            self.top_k is None or 1 <= self.top_k <= LARGEST_INDEX, "eval.top_k", self.top_k, right
        )
        require(self.top_p is None or 0 < self.top_p <= 1, "eval.top_p", self.top_p, "in (0, 1]")

    def of(self, model: ModelConfig) -> ModelConfig:
        """Returns the model with this routing. Its `moe.top_p` stays: a router has its own p.

        Raises:
          UserError: a model without experts, or a value that its routing does not read.
        """
        if self == EvalRouting():
            return model
        if not model.moe.num_experts:
            raise UserError("eval.routing: this run's model has no experts")
        kind = self.routing or model.moe.eval_routing
        for name, value in (("top_p", self.top_p), ("top_k", self.top_k)):
            if value is not None and kind != name:
                raise UserError(
                    f"eval.{name} = {value}: needs --eval.routing={name}, it is {kind!r}"
                )
        moe = dataclasses.replace(model.moe, eval_routing=kind, top_k=self.top_k or model.moe.top_k)
        return dataclasses.replace(model, moe=moe)
