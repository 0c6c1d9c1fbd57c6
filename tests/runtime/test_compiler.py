import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.runtime import compiler
from tests.targets import TPU


def test_options_are_those_of_the_platform():
    assert "while-loop-invariant-code-motion" in compiler.options()["xla_disable_hlo_passes"]
    with jax.sharding.use_abstract_mesh(TPU):
        assert all(value is True for value in compiler.options().values())
        assert compiler.options().keys() == {
            "xla_tpu_enable_deduplicated_calls",
            "xla_tpu_enable_async_all_to_all",
            "xla_tpu_enable_async_ragged_all_to_all",
        }


def test_a_loop_converts_the_weights_that_it_reads_and_no_others():
    def rows(x_MD, weight_EDD, index_M):
        product = lambda x, e: jnp.dot(x, weight_EDD[e], preferred_element_type=jnp.float32)  # noqa: E731
        return jax.lax.map(lambda row: product(row[0][None], row[1])[0], (x_MD, index_M))

    shapes = ((4, 64), jnp.bfloat16), ((64, 64, 64), jnp.bfloat16), ((4,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    jitted = jax.jit(rows, compiler_options=compiler.options())
    temporary = jitted.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 64 * 64 * 64 * 4


def test_jit_chooses_its_options_when_first_called(monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "options", lambda: asked.append(1) or {})
    double = compiler.jit(lambda x, by: by * x, static_argnames=("by",))
    assert not asked
    np.testing.assert_array_equal(double(jnp.arange(3), by=2), [0, 2, 4])
    double(jnp.arange(3), by=2)
    assert len(asked) == 1 and double._cache_size() == 1


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    size = jax.config.jax_compilation_cache_max_size
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_compilation_cache_max_size", size)


def test_a_cache_of_the_user_is_kept(no_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    compiler.cache_in(tmp_path / "ours")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours")
    compiler.cache_in(tmp_path / "other")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours")


def test_emulated_devices_compile_afresh(no_cache, tmp_path):
    assert jax.device_count() > 1
    compiler.cache_in(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


# Case F14
def test_programs_without_a_folder_share_a_bounded_cache_of_the_user(
    no_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.cache_for_user()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "lightning_jax" / "compiled")
    assert jax.config.jax_compilation_cache_max_size == 2**31


@pytest.mark.parametrize("home", ["", "file/below"])
def test_without_a_folder_for_it_nothing_is_cached(no_cache, tmp_path, monkeypatch, home):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", home and str(tmp_path / home))
    monkeypatch.setenv("HOME", "relative")
    compiler.cache_for_user()
    assert jax.config.jax_compilation_cache_dir is None
