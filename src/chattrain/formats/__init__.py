"""Models in the files of others: recognised, read into chattrain's own form, and written out of it."""
