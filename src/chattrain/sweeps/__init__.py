"""Several jobs from one command line: names, workers, the record in sweep.json, the adapter to Hydra's launchers."""
