"""Bundles: what crosses from the ground to the device, and what must hold before any of it is used."""

from edge_rsvlm.bundle.loading import Bundle, Candidate, Rules, candidate, load_bundle, pack, packaged_folder

__all__ = ["Bundle", "Candidate", "Rules", "candidate", "load_bundle", "pack", "packaged_folder"]
