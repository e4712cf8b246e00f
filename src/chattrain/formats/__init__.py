"""Model files of other programs: recognised, read as models of chattrain, and written."""
