# The demo in a container, on the CPU: docker build -t nnunet_uda . && docker run --rm -v "$PWD/demo_run:/demo" nnunet_uda
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*
WORKDIR /nnunet_uda
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu .
VOLUME /demo
CMD ["nnUNetUDA_demo", "-o", "/demo", "-device", "cpu"]
