# SPDX-License-Identifier: Apache-2.0
# NVIDIA's PyTorch image, for its torch and Transformer Engine, which .ci_build.sh keeps. 26.04 is the release that the
# recipe this project replaces was built on; CUDA 13.
FROM nvcr.io/nvidia/pytorch:26.04-py3

WORKDIR /opt/evo2-megatron
COPY . .
# there is no GPU while an image is built, so say what this is
RUN EVO2_BUILD=image ./.ci_build.sh

ENV VIRTUAL_ENV=/opt/evo2-megatron/.venv
ENV PATH=$VIRTUAL_ENV/bin:$PATH
CMD ["bash"]
