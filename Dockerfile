# The programs in a container, for a CPU (the last stage, so the default) or for NVIDIA GPUs:
#
#     docker build -t lightning-jax .
#     docker build -t lightning-jax:cuda --target cuda .
#     docker run --rm -v "$PWD:/work" lightning-jax train --config=quickstart --workdir=runs/a
#     docker run --rm --gpus=all -v "$PWD:/work" lightning-jax:cuda train --config=small --workdir=runs/b
#
# The container's user is number 1000; where the folder belongs to another one, add
# --user="$(id -u):$(id -g)". The GPU's driver and the NVIDIA Container Toolkit are the host's; CUDA
# itself comes with jax. `docker stop` saves the state of a training (give it --time=60).
#
# No image has been built from this file yet. What was checked: tests/test_dockerfile.py compares it
# with the sources, hadolint finds nothing, and a wheel that was built and installed in an empty
# virtual environment as here, but without the extras, trained and generated.

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY lightning_jax lightning_jax
COPY configs configs
COPY experiments experiments
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/dist .

FROM python:3.11-slim AS base
COPY constraints.txt /constraints.txt
COPY --from=wheel /dist /dist
# Caches that any user may write; no index of data and no compiled program outlives the container.
ENV PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib
RUN useradd --uid=1000 --create-home lightning && install --directory --owner=lightning /work
WORKDIR /work
ENTRYPOINT ["lightning-jax"]
CMD ["--help"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir --constraint=/constraints.txt "$(echo /dist/*.whl)[cuda,data,interop]"
USER 1000

FROM base AS cpu
RUN pip install --no-cache-dir --constraint=/constraints.txt "$(echo /dist/*.whl)[data,interop]"
USER 1000
