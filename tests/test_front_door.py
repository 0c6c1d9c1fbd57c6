import subprocess
import sys

import pytest

import lightning_jax


@pytest.mark.parametrize("name", lightning_jax.__all__)
def test_every_export_is_the_thing_itself(name):
    thing = getattr(lightning_jax, name)
    assert thing.__name__.rpartition(".")[2] == name and name in dir(lightning_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lightning_jax.lode


def test_importing_the_package_imports_nothing_else():
    program = "import sys, lightning_jax; assert not {'jax', 'flax', 'grain'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
