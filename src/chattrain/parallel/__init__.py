"""How the work of a step is spread over processes: `alone`, `ddp` (replicated weights), `fsdp` (sharded weights)."""
