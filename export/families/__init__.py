"""Model families that can be exported: one file each, all of the same shape (see ``base``)."""
