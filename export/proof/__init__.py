"""What a bundle is compared with, how far it may be off, and what it takes of memory."""
