# Veneer as a user without rights:
#
#   docker build -t veneer .
#   docker run --rm -it -v "$PWD":/work -v veneer:/home/veneer/.cache veneer demo
#
# --build-arg TORCH_INDEX=ADDRESS takes torch from another index, such as PyTorch's own for CPUs, which leaves out some
# GB, or for one CUDA. For a GPU: docker run --gpus all. Podman takes the same lines. Models and data sets are kept in the volume.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

# gcc: Triton, which comes with torch for CUDA, makes its launchers with it.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN pip install --no-cache-dir "$(ls /wheels/veneer-*.whl)[serve,parquet,metrics]"
RUN useradd --create-home --uid 1000 veneer && mkdir /work && chown veneer /work
USER veneer
WORKDIR /work
ENTRYPOINT ["veneer"]
CMD ["--help"]
