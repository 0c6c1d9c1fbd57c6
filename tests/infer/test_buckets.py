from lightning_jax.infer.buckets import length_bucket, power_of_two


def test_lengths_grow_by_less_than_a_half():
    sizes = [length_bucket(length) for length in range(1, 5000)]
    assert sizes == sorted(sizes) and set(sizes[:200]) == {32, 48, 64, 96, 128, 192, 256}
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= max(32, n * 1.5) for n, size in enumerate(sizes, 1))


def test_powers_of_two():
    assert [power_of_two(count) for count in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
