"""Typed, versioned configuration: bundle manifests, jobs and units. Unknown keys are refused."""
