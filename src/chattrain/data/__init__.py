"""From records to batches: sources -> cache -> mixture -> packing -> collators -> loader. docs/data.md follows one record."""
