//go:build tools

// Package tools names the commands that check what is under deploy/, so that go.mod and go.sum hold
// what they need. Nothing is built from this file itself.
package tools

import (
	_ "helm.sh/helm/v4/cmd/helm"
	_ "sigs.k8s.io/kustomize/kustomize/v5"
)
