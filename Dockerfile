# SPDX-License-Identifier: Apache-2.0
# Two images: `docker build -t evo2-megatron .` for GPUs, and `docker build --target cpu -t evo2-megatron-cpu .`

FROM python:3.12-slim-bookworm AS cpu
# for the packages that are built on installation, and for make
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/evo2-megatron
COPY . .
RUN EVO2_BUILD=cpu ./.ci_build.sh
ENV VIRTUAL_ENV=/opt/evo2-megatron/.venv
ENV PATH=$VIRTUAL_ENV/bin:$PATH
CMD ["bash"]

# NVIDIA's PyTorch image, for its torch and Transformer Engine, which .ci_build.sh keeps. 26.04 is the release that the
# recipe this project replaces was built on; CUDA 13. The last target is what docker builds unless told otherwise.
FROM nvcr.io/nvidia/pytorch:26.04-py3 AS gpu
WORKDIR /opt/evo2-megatron
COPY . .
# there is no GPU while an image is built, so say what this is
RUN EVO2_BUILD=image ./.ci_build.sh
ENV VIRTUAL_ENV=/opt/evo2-megatron/.venv
ENV PATH=$VIRTUAL_ENV/bin:$PATH
CMD ["bash"]
