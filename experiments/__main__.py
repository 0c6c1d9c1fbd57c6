"""Lists the programs: `python -m experiments`, or the console script `lightning-jax`."""

from lightning_jax.runtime import console

if __name__ == "__main__":
    console.main()
