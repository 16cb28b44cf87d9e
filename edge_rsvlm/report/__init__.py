"""What people look at: overlays, and one page that needs no network."""
