#!/bin/sh
# Checks the manifests, the Dockerfile and the alert rules with the tools of others, without a cluster.
# Needs on PATH: kubectl, kubernetes-validate, checkov, promtool.
set -eu
cd "$(dirname "$0")"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

export LOG_LEVEL=ERROR  # of checkov, which otherwise tells at length that it may ask nobody
KUBERNETES_VERSIONS="1.32.0 1.36.0"

# What checkov finds and we mean:
# CKV_K8S_43, CKV_K8S_15: our own images are built where they are used, under a tag that does not move.
# CKV_K8S_35: S3's and Redis' logins are variables, as their clients' documentation has it; the engine
#   of a trainer does not get them. The server secret and the operator's key are files.
# CKV_DOCKER_7: the base image is an argument, pinned by digest.
SKIPPED=CKV_K8S_43,CKV_K8S_15,CKV_K8S_35,CKV_DOCKER_7

for overlay in k8s/overlays/*/; do
  name=$(basename "$overlay")
  kubectl kustomize "$overlay" > "$made/$name.yaml"
  for version in $KUBERNETES_VERSIONS; do
    kubernetes-validate --kubernetes-version "$version" --strict --quiet "$made/$name.yaml"
    echo "$name: valid for Kubernetes $version"
  done
done
checkov --directory "$made" --framework kubernetes --skip-check "$SKIPPED" --skip-download --compact --quiet
echo "manifests: checkov finds nothing"
checkov --file Dockerfile --framework dockerfile --skip-check "$SKIPPED" --skip-download --compact --quiet
echo "Dockerfile: checkov finds nothing"

promtool check rules prometheus/alerts.yaml
promtool test rules prometheus/alerts_test.yaml
