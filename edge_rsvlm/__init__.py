"""edge-rsvlm: vision-language answers on remote-sensing rasters, inside a memory and a latency budget."""

__version__ = "0.1.0"
