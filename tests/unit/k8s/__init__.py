"""Manifests under k8s/."""
