"""A folder that fills with scenes: each is compared with the one before it, and what matters leaves the device."""
