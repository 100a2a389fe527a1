# The operator's image. It runs in three places: as the operator, as the init container that drops the profiler and the
# replica supervisor into a user's engine image (`tightship inject`), and in the pods that hold GPUs (`tightship node`).
#
# BASE_IMAGE needs Python 3.11 or newer with venv and pip. Wheels and pip's configuration can be given to the build, for
# networks without a package index:
#   --secret id=pip,src=pip.conf          read as PIP_CONFIG_FILE
#   --volume WHEELS:/wheels:ro            (buildah) named by that configuration
ARG BASE_IMAGE=python:3.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
# Copied, not linked, so that the environment stands on the same interpreter in the next stage; no bytecode, since the
# root file system is read-only where it runs and a layer with it is not reproducible.
RUN --mount=type=secret,id=pip,required=false \
    if [ -f /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi; \
    python3 -m venv /opt/tightship && \
    /opt/tightship/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check /src && \
    /opt/tightship/bin/pip uninstall --yes --quiet pip setuptools

FROM ${BASE_IMAGE}
COPY --from=build /opt/tightship /opt/tightship
COPY LICENSE /usr/share/doc/tightship/LICENSE
# The link that holders' PATH and people expect; the environment's own interpreter runs it.
RUN ln -s /opt/tightship/bin/tightship /usr/local/bin/tightship
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Numeric, so that runAsNonRoot can be checked without reading /etc/passwd.
USER 65532:65532
WORKDIR /
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/tightship"]
CMD ["run"]
