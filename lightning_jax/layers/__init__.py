"""flax.linen shells: parameters with logical axis names, then a call into `ops`."""
