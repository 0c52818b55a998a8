# An image with flax-switch and its recipes; docs/launching.md runs it under Kubernetes.
#   docker build --build-arg EXTRAS=cuda,gcs --tag REGISTRY/flax_switch .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG EXTRAS=gcs
COPY --from=build /dist /dist
RUN pip install --no-cache-dir "$(ls /dist/*.whl)[gin,plots,${EXTRAS}]"
# The processes write to a workdir that all of them reach, never into the image.
RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer
CMD ["flax-switch", "recipes"]
