"""Merging across tile borders: ``feed()`` and ``flush()``, the same result for any order and size of what is fed."""
