# The image of the service: built in one stage, run in another, as nobody in particular (uid 65532), fit for a
# read-only root file system. No test or demo packages: requirements/base.txt is all it holds.
# Pinned: the multi-platform index of python:3.13.15-slim-trixie, as several published builds of it name it. To renew it,
# take what `docker buildx imagetools inspect python:3.13-slim` says, or give another image: --build-arg BASE=NAME@sha256:…
ARG BASE=python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements/base.txt requirements/build.txt requirements/
RUN python3 -m venv /app && python3 -m venv /tools \
    && /app/bin/pip install --require-hashes --only-binary :all: -r requirements/base.txt \
    && /tools/bin/pip install --require-hashes -r requirements/build.txt
COPY . .
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /app/bin/pip install --no-deps dist/*.whl \
    && /app/bin/pip uninstall -y pip \
    && python3 -m compileall -q /app/lib

FROM ${BASE}
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /app /app
# For SPOOL_DIR: a new named volume that is mounted here takes its owner and mode from it.
RUN install -d -o 65532 -g 65532 -m 0700 /spool
USER 65532:65532
EXPOSE 8080
# SIGTERM drains; Kubernetes sends it, and so does `docker stop`. Give it 90 s: terminationGracePeriodSeconds, --stop-timeout.
STOPSIGNAL SIGTERM
# For engines that look (Docker, Compose, Swarm); Kubernetes asks /livez and /readyz itself.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["bon-scheduler", "healthcheck"]
ENTRYPOINT ["bon-scheduler"]
CMD ["serve"]
