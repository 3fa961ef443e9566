# The server and the shipped model, on a CPU. docs/deploy.md says how to run it.
FROM python:3.11-slim AS build
# if your index serves CUDA builds, choose another: --build-arg TORCH_OPTIONS="--index-url ..."
ARG TORCH_OPTIONS=""
RUN python -m venv /opt/diffucoder
ENV PATH=/opt/diffucoder/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# first and in a layer of its own: it is the largest, and changes only with the range
# hadolint ignore=SC2086,DL3013
RUN pip install $TORCH_OPTIONS "torch>=2.11,<2.14"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY diffucoder ./diffucoder
# hadolint ignore=DL3013
RUN pip install ".[serve]"

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent diffucoder && install -d -o diffucoder /models
COPY --from=build /opt/diffucoder /opt/diffucoder
ENV PATH=/opt/diffucoder/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# give the key as $DIFFUCODER_API_KEY, or by --api-key-file after the image's name; without one it needs --no-key
ENTRYPOINT ["diffucoder", "serve", "--host", "0.0.0.0"]
