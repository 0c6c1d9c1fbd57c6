"""Meshes of devices that are not here, to compile or choose for; what is in a program for them."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

TPU = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))
HOPPER = AbstractMesh(
    (1,), ("data",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
)


def products(jaxpr):
    """All matrix products of a program: (where it is, dtypes of the operands, exact)."""
    for eqn in jaxpr.eqns:
        if "dot_general" in eqn.primitive.name:
            dtypes = {str(operand.aval.dtype) for operand in eqn.invars[:2]}
            yield eqn.source_info.name_stack, dtypes, "HIGHEST" in str(eqn.params["precision"])
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from products(getattr(inner, "jaxpr", inner))


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
